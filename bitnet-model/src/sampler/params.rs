//! What can be set about sampling, and its ranges.

use crate::{Error, Result};

/// How to choose the next token. The default draws from the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; at least 0. 0 is greedy: the best token, the lowest id among equals.
    pub temperature: f32,
    /// Keeps the tokens whose logit is at least the k-th largest, so ties may leave more than k; at
    /// least 1.
    pub top_k: Option<usize>,
    /// Keeps the fewest most probable tokens whose mass reaches this; in (0, 1], 1 is off.
    pub top_p: f32,
    /// Keeps the tokens at least this fraction as probable as the best one; in [0, 1], 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of every token of the prompt and the reply;
    /// above 0, 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it stands in the reply; in [-2, 2], 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of every token of the reply; in [-2, 2], 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of these token ids, entries of the same id together. `-inf` excludes a
    /// token.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.,
            top_k: None,
            top_p: 1.,
            min_p: 0.,
            repetition_penalty: 1.,
            frequency_penalty: 0.,
            presence_penalty: 0.,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Always the best token.
    pub fn greedy() -> Self {
        Self { temperature: 0., ..Self::default() }
    }

    pub(super) fn validate(&self) -> Result<()> {
        // Written so that NaN fails every test.
        let in_range = |field: &str, value: f32, ok: bool, range: &str| {
            if ok {
                return Ok(());
            }
            Err(Error::Input(format!("{field} is {value}, but must be {range}")))
        };
        let (t, r) = (self.temperature, self.repetition_penalty);
        in_range("temperature", t, t >= 0. && t.is_finite(), "finite and at least 0")?;
        if self.top_k == Some(0) {
            return Err(Error::Input("top_k is 0, but must be at least 1".into()));
        }
        in_range(
            "top_p",
            self.top_p,
            self.top_p > 0. && self.top_p <= 1.,
            "above 0 and at most 1",
        )?;
        in_range("min_p", self.min_p, (0. ..=1.).contains(&self.min_p), "between 0 and 1")?;
        in_range("repetition_penalty", r, r > 0. && r.is_finite(), "finite and above 0")?;
        for (field, penalty) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ] {
            in_range(field, penalty, (-2. ..=2.).contains(&penalty), "between -2 and 2")?;
        }
        for &(id, bias) in &self.logit_bias {
            let field = format!("logit_bias of token {id}");
            in_range(&field, bias, bias < f32::INFINITY, "a number or -inf")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked_by_name() {
        let base = SamplingParams::default;
        let nan = f32::NAN;
        for (params, message) in [
            (SamplingParams { temperature: nan, ..base() }, "temperature is NaN"),
            (SamplingParams { temperature: -0.5, ..base() }, "temperature is -0.5"),
            (SamplingParams { temperature: f32::INFINITY, ..base() }, "temperature is inf"),
            (SamplingParams { top_k: Some(0), ..base() }, "top_k is 0"),
            (SamplingParams { top_p: 0., ..base() }, "top_p is 0"),
            (SamplingParams { top_p: 1.1, ..base() }, "top_p is 1.1"),
            (SamplingParams { min_p: nan, ..base() }, "min_p is NaN"),
            (SamplingParams { repetition_penalty: 0., ..base() }, "repetition_penalty is 0"),
            (SamplingParams { frequency_penalty: 2.5, ..base() }, "frequency_penalty is 2.5"),
            (SamplingParams { presence_penalty: nan, ..base() }, "presence_penalty is NaN"),
            (SamplingParams { logit_bias: vec![(3, nan)], ..base() }, "logit_bias of token 3"),
        ] {
            let error = params.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
