//! Memory: how much a run will take, and how much it took.

use std::fs;

use bitnet_model::{config::Config, pretrained::Source, session::PREFILL_CHUNK};

use crate::limits::buffer_bytes;

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

/// Begins a new peak of resident memory. Whether the system can (Linux): otherwise the peak is that of the whole process.
pub fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}
