//! Memory: how much a run will take, how much there is, and how much it took.

use std::{fs, path::Path};

use bitnet_model::{config::Config, pretrained::Source, session::PREFILL_CHUNK};

use super::limits::buffer_bytes;
use crate::statistics::proc_field;

/// Bytes that the weights will take.
pub fn model_bytes(source: &Source, screened: bool) -> u64 {
    source.weight_bytes(screened && source.reads_rows()).total()
}

/// Bytes beside the weights and the cache: activations of a chunk of a prompt, and the buffer that bandwidth is measured
/// with.
pub fn working_bytes(config: &Config, batch: usize) -> u64 {
    // Gate, up and their product; residual, norm, queries, keys, values and attention are at most as much again.
    let widths = 3 * config.intermediate_size + 6 * config.hidden_size;
    let activations = PREFILL_CHUNK.get().max(batch).saturating_mul(widths);
    let logits = batch.saturating_mul(3 * config.vocab_size);
    let floats = activations.saturating_add(logits).saturating_mul(size_of::<f32>());
    floats.saturating_add(buffer_bytes()) as u64
}

/// Bytes that this process may still take: what the system has available, within the limit of its control group.
/// `None` where the system does not say.
pub fn available() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let system = proc_field(&meminfo, "MemAvailable:")?;
    Some(system.min(group_limit().unwrap_or(u64::MAX)))
}

/// What the control group of a container leaves, version 2 or 1; in containers its folder is the root of the tree.
fn group_limit() -> Option<u64> {
    let number = |path: &str| -> Option<u64> {
        fs::read_to_string(Path::new("/sys/fs/cgroup").join(path)).ok()?.trim().parse().ok()
    };
    let left = |limit: &str, used: &str| Some(number(limit)?.saturating_sub(number(used)?));
    left("memory.max", "memory.current")
        .or_else(|| left("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
}

/// Begins a new peak of resident memory. Whether the system can (Linux): otherwise the peak is that of the whole process.
pub fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}
