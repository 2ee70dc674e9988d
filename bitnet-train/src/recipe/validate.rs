//! Which values of a recipe make sense. Messages name the key.

use super::{Model, Optimizer, Precision, Recipe, Train};
use crate::{Error, Result};

impl Recipe {
    /// Says which key has a value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        self.model.validate(self.init.is_some())?;
        self.validate_lora()?;
        self.quantization.validate(self.model.precision == Precision::Full)?;
        if let Some(distillation) = &self.distillation {
            distillation.validate(self.model.num_hidden_layers)?;
        }
        self.data.validate(&self.model)?;
        self.train.validate()?;
        if let Some(samples) = &self.samples {
            samples.validate()?;
        }
        self.optimizer.validate()
    }

    /// `[lora]`, and what it leaves no room for.
    fn validate_lora(&self) -> Result<()> {
        let Some(lora) = &self.lora else { return Ok(()) };
        lora.validate()?;
        if self.init.is_none() {
            let reason = "an adapter needs a model to stand beside; name it, or `default`";
            return Err(Error::recipe("init.model", reason));
        }
        let is_full = self.model.precision == Precision::Full;
        let taken = [
            ("init.sub_norms", self.init.as_ref().is_some_and(|init| init.sub_norms)),
            ("quantization", self.quantization != Default::default()),
            ("distillation", self.distillation.is_some()),
            ("model.precision", is_full),
        ];
        match taken.into_iter().find(|(_, is_given)| *is_given) {
            Some((key, _)) => {
                let reason = "is about weights that are trained, and [lora] trains an adapter beside a model that \
                              stays as it is; leave one of them out";
                Err(Error::recipe(key, reason))
            }
            None => Ok(()),
        }
    }
}

pub(super) fn at_least_one(key: &'static str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::recipe(key, "must be at least 1"));
    }
    Ok(())
}

fn within(key: &'static str, value: f64, is_valid: bool, expected: &str) -> Result<()> {
    if !is_valid {
        return Err(Error::recipe(key, format!("is {value}; must be {expected}")));
    }
    Ok(())
}

pub(super) fn positive(key: &'static str, value: f64) -> Result<()> {
    within(key, value, value.is_finite() && value > 0., "a positive number")
}

impl Model {
    /// `is_given` says that the geometry is a checkpoint's.
    fn validate(&self, is_given: bool) -> Result<()> {
        for (key, value) in [
            ("model.hidden_size", self.hidden_size),
            ("model.intermediate_size", self.intermediate_size),
            ("model.num_hidden_layers", self.num_hidden_layers),
            ("model.num_attention_heads", self.num_attention_heads),
            ("model.num_key_value_heads", self.num_key_value_heads),
            ("model.vocab_size", self.vocab_size),
            ("model.max_position_embeddings", self.max_position_embeddings),
        ] {
            at_least_one(key, value)?;
        }
        let Self {
            hidden_size: hidden,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            ..
        } = *self;
        if let Some(size) = self.head_dim
            && (size == 0 || size % 2 != 0 || (!is_given && size * heads != hidden))
        {
            let reason = format!(
                "{size} must be even, and {heads} heads of it the {hidden} of `model.hidden_size`"
            );
            return Err(Error::recipe("model.head_dim", reason));
        }
        if self.head_dim.is_none() && hidden % (2 * heads) != 0 {
            let reason = format!(
                "{hidden} is not {heads} heads (`model.num_attention_heads`) of an even size"
            );
            return Err(Error::recipe("model.hidden_size", reason));
        }
        if heads % kv_heads != 0 {
            let reason =
                format!("{kv_heads} does not divide the {heads} of `model.num_attention_heads`");
            return Err(Error::recipe("model.num_key_value_heads", reason));
        }
        let packed = [
            ("model.hidden_size", hidden),
            ("model.intermediate_size", self.intermediate_size),
            ("model.num_key_value_heads", self.head_dim() * kv_heads),
            ("model.num_attention_heads", self.head_dim() * heads),
        ];
        if let Some((key, rows)) = packed.into_iter().find(|(_, rows)| rows % 4 != 0) {
            let reason =
                format!("gives a matrix of {rows} rows; ternary matrices are packed by 4 rows");
            return Err(Error::recipe(key, reason));
        }
        positive("model.rope_theta", self.rope_theta)?;
        positive("model.rms_norm_eps", self.rms_norm_eps)
    }
}

impl Train {
    fn validate(&self) -> Result<()> {
        at_least_one("train.batch_size", self.batch_size)?;
        at_least_one("train.gradient_accumulation", self.gradient_accumulation)?;
        at_least_one("train.eval_every", self.eval_every)?;
        at_least_one("train.save_every", self.save_every)?;
        at_least_one("train.save_total_limit", self.save_total_limit)?;
        match (self.steps, self.epochs) {
            (Some(0), None) => {
                return Err(Error::recipe(
                    "train.steps",
                    "must be at least 1: rounding the weights of a trained model to three values destroys it, training \
                     with quantization in the loop is what makes it work; to see how much is lost, run \
                     `bitnet convert MODEL OUT --to packed --i-know --text FILE`",
                ));
            }
            (Some(_), None) => {}
            (None, Some(epochs)) => positive("train.epochs", epochs)?,
            _ => {
                return Err(Error::recipe(
                    "train.steps",
                    "give either `train.steps` or `train.epochs`",
                ));
            }
        }
        if let Some(patience) = self.early_stop_patience {
            at_least_one("train.early_stop_patience", patience)?;
        }
        if let Some(every) = self.codes_every {
            at_least_one("train.codes_every", every)?;
        }
        self.limits.validate()?;
        positive("train.max_grad_norm", self.max_grad_norm)
    }
}

impl Optimizer {
    fn validate(&self) -> Result<()> {
        positive("optimizer.peak_lr", self.peak_lr)?;
        if let Some(lr) = self.second_peak_lr {
            positive("optimizer.second_peak_lr", lr)?;
        }
        positive("optimizer.eps", self.eps)?;
        for (key, beta) in [("optimizer.beta1", self.beta1), ("optimizer.beta2", self.beta2)] {
            within(key, beta, (0. ..1.).contains(&beta), "at least 0 and less than 1")?;
        }
        if let Some(ratio) = self.warmup_ratio {
            within(
                "optimizer.warmup_ratio",
                ratio,
                (0. ..1.).contains(&ratio),
                "at least 0 and less than 1",
            )?;
            if self.warmup_steps > 0 {
                let reason = "give either `optimizer.warmup_steps` or `optimizer.warmup_ratio`";
                return Err(Error::recipe("optimizer.warmup_ratio", reason));
            }
        }
        let decay = self.weight_decay;
        within("optimizer.weight_decay", decay, (0. ..=1.).contains(&decay), "between 0 and 1")
    }
}
