//! What a generation cost: the line on stderr and the object in `--json`.

use std::{fmt, time::Duration};

use bitnet_model::session::Generation;
use serde::Serialize;

/// Speed and memory of one generation. A rate is absent when nothing was run to measure it by.
#[derive(Clone, Debug, Serialize)]
pub struct Statistics {
    /// Prompt tokens that had to be run.
    #[serde(skip)]
    prompt_tokens: usize,
    /// Tokens added.
    #[serde(skip)]
    new_tokens: usize,
    prompt_tokens_per_second: Option<f64>,
    decode_tokens_per_second: Option<f64>,
    /// From the start of the prompt.
    time_to_first_token_seconds: Option<f64>,
    /// Prompt and continuation, without loading.
    total_seconds: f64,
    /// Tokens that speculation proposed, and how many of them were right; absent without speculation.
    #[serde(skip_serializing_if = "is_zero")]
    drafted_tokens: usize,
    #[serde(skip_serializing_if = "is_zero")]
    accepted_tokens: usize,
    /// Finding, reading and checking the model.
    load_seconds: f64,
    /// Rows of the output head multiplied exactly for a token, where the others were screened out.
    #[serde(skip_serializing_if = "Option::is_none")]
    rescored_rows_per_token: Option<f64>,
    /// All of it: weights, keys and values, everything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    /// Of that, keys and values.
    kv_cache_bytes: usize,
}

impl Statistics {
    /// Of a generation that ran `decoded` of its own tokens through the model (the last one often
    /// need not run), whose first token came after `first_token`, and whose keys and values take `kv_cache_bytes`.
    pub fn new(
        generation: &Generation,
        decoded: usize,
        first_token: Option<Duration>,
        load_time: Duration,
        kv_cache_bytes: usize,
    ) -> Self {
        let rate = |tokens: usize, time: Duration| {
            (tokens > 0 && !time.is_zero()).then(|| tokens as f64 / time.as_secs_f64())
        };
        Self {
            prompt_tokens: generation.prompt_tokens,
            new_tokens: generation.tokens.len(),
            prompt_tokens_per_second: rate(generation.prompt_tokens, generation.prompt_time),
            decode_tokens_per_second: rate(decoded, generation.decode_time),
            time_to_first_token_seconds: first_token.map(|time| time.as_secs_f64()),
            total_seconds: (generation.prompt_time + generation.decode_time).as_secs_f64(),
            drafted_tokens: generation.drafted.tokens,
            accepted_tokens: generation.drafted.accepted,
            load_seconds: load_time.as_secs_f64(),
            rescored_rows_per_token: generation.rescored_rows,
            peak_memory_bytes: peak_memory(),
            kv_cache_bytes,
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |f: &mut fmt::Formatter<'_>, tokens, what, rate: Option<f64>| {
            write!(f, "{tokens} {what} tokens")?;
            rate.map_or(Ok(()), |rate| write!(f, " at {rate:.1} tokens/s"))
        };
        part(f, self.prompt_tokens, "prompt", self.prompt_tokens_per_second)?;
        write!(f, ", ")?;
        part(f, self.new_tokens, "new", self.decode_tokens_per_second)?;
        if self.drafted_tokens > 0 {
            write!(f, ", {} of {} drafted accepted", self.accepted_tokens, self.drafted_tokens)?;
        }
        if let Some(seconds) = self.time_to_first_token_seconds {
            write!(f, ", first token after {seconds:.3} s")?;
        }
        if let Some(rows) = self.rescored_rows_per_token {
            write!(f, ", {rows:.1} rescored rows per token")?;
        }
        if let Some(bytes) = self.peak_memory_bytes {
            let cache = Bytes(self.kv_cache_bytes as u64);
            write!(f, ", peak memory {} of which {cache} keys and values", Bytes(bytes))?;
        }
        Ok(())
    }
}

/// A number of bytes for people.
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1u64 << 20) as f64;
        match self.0 as f64 / MIB {
            mib if mib >= 1024. => write!(f, "{:.2} GiB", mib / 1024.),
            mib => write!(f, "{mib:.1} MiB"),
        }
    }
}

/// The most memory this process has occupied so far, where the system tells (Linux).
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    proc_field(&status, "VmHWM:")
}

/// A line of a file in `/proc` in kB, as bytes.
pub fn proc_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use bitnet_model::session::Finish;

    use super::*;

    #[test]
    fn rates_and_line() {
        let generation = Generation {
            tokens: vec![1, 2, 3],
            finish: Finish::Length,
            prompt_tokens: 10,
            prompt_time: Duration::from_millis(100),
            decode_time: Duration::from_millis(500),
            drafted: Default::default(),
            rescored_rows: Some(3.25),
        };
        let first = Some(Duration::from_millis(125));
        let mut statistics =
            Statistics::new(&generation, 2, first, Duration::from_secs(1), 5 << 20);
        statistics.peak_memory_bytes = Some(3 << 30);
        assert_eq!(
            statistics.to_string(),
            "10 prompt tokens at 100.0 tokens/s, 3 new tokens at 4.0 tokens/s, \
             first token after 0.125 s, 3.2 rescored rows per token, \
             peak memory 3.00 GiB of which 5.0 MiB keys and values"
        );
        let none =
            Generation { tokens: Vec::new(), prompt_tokens: 0, rescored_rows: None, ..generation };
        let mut statistics = Statistics::new(&none, 0, None, Duration::ZERO, 0);
        statistics.peak_memory_bytes = None;
        assert_eq!(statistics.to_string(), "0 prompt tokens, 0 new tokens");
        assert!(serde_json::to_value(&statistics).unwrap().get("peak_memory_bytes").is_none());
    }

    #[test]
    fn fields_of_proc() {
        let text = "MemTotal:       24683520 kB\nMemAvailable:   2 kB\nPages: 3\n";
        assert_eq!(proc_field(text, "MemAvailable:"), Some(2048));
        assert_eq!(proc_field(text, "Pages:"), None);
        assert_eq!(proc_field(text, "Swap:"), None);
    }

    #[test]
    fn peak_memory_of_a_status_file() {
        let status = "Name:\tbitnet\nVmPeak:\t  900 kB\nVmHWM:\t   12 kB\n";
        assert_eq!(proc_field(status, "VmHWM:"), Some(12 << 10));
        assert_eq!(proc_field("Name:\tbitnet\n", "VmHWM:"), None);
        assert_eq!(Bytes(45 << 20).to_string(), "45.0 MiB");
        if cfg!(target_os = "linux") {
            assert!(peak_memory().is_some_and(|bytes| bytes > 1 << 20));
        }
    }
}
