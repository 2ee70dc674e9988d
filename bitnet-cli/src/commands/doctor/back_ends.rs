//! Every back end of this machine, compared with the portable kernel on the processor.

use serde::Serialize;

use super::trial::{self, Outcome};
use crate::args::Global;

/// The kernel that every processor can run, with which all others are compared.
const REFERENCE: &str = "scalar";

/// A back end, tried.
#[derive(Clone, Debug, Serialize)]
pub struct BackEnd {
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// The kernel on the processor, which computes on a device too what that does not.
    pub kernel: &'static str,
    /// What its results are.
    pub result: Verdict,
    /// Where they differ, or why there are none.
    pub detail: Option<String>,
    /// Of the embedded model.
    pub tokens_per_second: Option<f64>,
}

/// What the results of a back end are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Those that the others are compared with.
    Reference,
    /// The same, bit for bit.
    Equal,
    /// Others: they are wrong.
    Differ,
    /// Not there: it crashed, does not end, or says that it cannot.
    Failed,
    /// Not compared, as the reference failed.
    Unknown,
}

impl Verdict {
    /// Whether the back end can be used.
    pub fn is_good(self) -> bool {
        matches!(self, Self::Reference | Self::Equal)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Equal => "equal",
            Self::Differ => "differ",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

impl BackEnd {
    /// Tries all `kernels` on the processor, and `devices` with the kernel in use, telling `say` of each.
    pub fn try_all(
        kernels: &[&'static str],
        (devices, active): (&[String], &'static str),
        global: &Global,
        say: impl Fn(&str),
    ) -> Vec<Self> {
        let cpu = kernels.iter().map(|&kernel| ("cpu".to_owned(), kernel));
        let all = cpu.chain(devices.iter().map(|device| (device.clone(), active)));
        let tried = all.map(|(device, kernel)| {
            say(&format!("trying {kernel} on {device}"));
            let outcome = trial::start(kernel, &device, global);
            (device, kernel, outcome)
        });
        Self::compared(tried.collect())
    }

    /// Judges outcomes of devices and kernels.
    fn compared(tried: Vec<(String, &'static str, Result<Outcome, String>)>) -> Vec<Self> {
        let is_reference = |device: &str, kernel| device == "cpu" && kernel == REFERENCE;
        let reference = tried.iter().find(|(device, kernel, _)| is_reference(device, *kernel));
        let reference = reference.and_then(|(.., outcome)| outcome.clone().ok());
        let judge = |(device, kernel, outcome): (String, &'static str, Result<Outcome, String>)| {
            let tokens_per_second = outcome.as_ref().ok().map(|outcome| outcome.tokens_per_second);
            let (result, detail) = match (&outcome, &reference) {
                (Err(reason), _) => (Verdict::Failed, Some(reason.clone())),
                _ if is_reference(&device, kernel) => (Verdict::Reference, None),
                (_, None) => (Verdict::Unknown, None),
                (Ok(found), Some(expected)) => match found.first_difference(expected) {
                    None => (Verdict::Equal, None),
                    Some(detail) => (Verdict::Differ, Some(detail)),
                },
            };
            Self { device, kernel, result, detail, tokens_per_second }
        };
        tried.into_iter().map(judge).collect()
    }

    /// Tokens of the embedded model a second; 0 without results.
    pub fn speed(&self) -> f64 {
        self.tokens_per_second.unwrap_or(0.)
    }

    /// Those whose results are right, on the processor or on devices.
    pub fn good(all: &[Self], on_processor: bool) -> impl Iterator<Item = &Self> + Clone {
        all.iter()
            .filter(move |tried| tried.result.is_good() && (tried.device == "cpu") == on_processor)
    }
}

impl Outcome {
    /// From where on this is not `expected`.
    fn first_difference(&self, expected: &Self) -> Option<String> {
        let pairs = self.digests.iter().zip(&expected.digests);
        let (found, wanted) = (self.digests.len(), expected.digests.len());
        let position = pairs.take_while(|(found, expected)| found == expected).count();
        if position == found && found == wanted {
            return None;
        }
        let tokens = match self.tokens == expected.tokens {
            true => "the tokens are the same",
            false => "the tokens differ too",
        };
        Some(format!("logits differ from position {} of {wanted} on; {tokens}", position + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(tokens: &[u32], digests: &[&str]) -> Result<Outcome, String> {
        let digests = digests.iter().map(ToString::to_string).collect();
        Ok(Outcome { tokens: tokens.to_vec(), digests, tokens_per_second: 5. })
    }

    #[test]
    fn another_bit_is_another_result() {
        let cpu = |kernel, outcome| ("cpu".to_owned(), kernel, outcome);
        let judged = BackEnd::compared(vec![
            cpu("avx2", outcome(&[1], &["a", "b", "c"])),
            cpu("avxvnni", outcome(&[1], &["a", "x", "c"])),
            cpu("avx512vnni", Err("signal: 4".into())),
            cpu("scalar", outcome(&[1], &["a", "b", "c"])),
            ("cuda:0".to_owned(), "scalar", outcome(&[2], &["a", "b"])),
        ]);
        let results: Vec<_> = judged.iter().map(|back_end| back_end.result).collect();
        use Verdict::*;
        assert_eq!(results, [Equal, Differ, Failed, Reference, Differ]);
        let detail = |index: usize| judged[index].detail.as_deref().unwrap_or_default();
        assert_eq!(detail(1), "logits differ from position 2 of 3 on; the tokens are the same");
        assert_eq!(detail(2), "signal: 4");
        assert_eq!(detail(4), "logits differ from position 3 of 3 on; the tokens differ too");
        assert_eq!((judged[2].speed(), judged[4].speed()), (0., 5.));
        let good = |on_processor| BackEnd::good(&judged, on_processor).map(|tried| tried.kernel);
        assert!(good(true).eq(["avx2", "scalar"]) && good(false).count() == 0);
    }

    #[test]
    fn nothing_is_right_without_a_reference() {
        let judged = BackEnd::compared(vec![
            ("cpu".into(), "avx2", outcome(&[1], &["a"])),
            ("cpu".into(), "scalar", Err("killed".into())),
        ]);
        let results: Vec<_> = judged.iter().map(|back_end| back_end.result).collect();
        assert_eq!(results, [Verdict::Unknown, Verdict::Failed]);
        assert!(results.iter().all(|result| !result.is_good()));
    }
}
