//! Memory: how much a run will take, how much there is, and how much it took.

use std::{fs, path::Path};

use bitnet_model::{
    config::Config,
    kernels::{
        head::HeadFormat,
        tile::{ROWS, Tile},
    },
    nn::HeadPrecision,
    ops::KvType,
    pretrained::Source,
    session::PREFILL_CHUNK,
};

use super::limits::buffer_bytes;
use crate::statistics;

/// Bytes of keys and values of one token of one sequence.
pub fn kv_bytes(config: &Config, kv_type: KvType) -> usize {
    2 * config.num_hidden_layers * config.num_key_value_heads * kv_type.bytes(config.head_dim)
}

/// Bytes that the weights will take.
pub fn model_bytes(source: &Source, screened: bool) -> u64 {
    let config = &source.config;
    let float = source.embedding_dtype().size_in_bytes();
    let tile_cols = source.tile_format.unwrap_or_default().cols();
    let projection = |(_, (rows, cols)): (String, (usize, usize))| match config.quantization {
        Some(_) => rows.div_ceil(ROWS) * cols.div_ceil(tile_cols) * size_of::<Tile>(),
        None => rows * cols * float,
    };
    let projections: usize = config.projections().map(projection).sum();
    let vocabulary = config.vocab_size * config.hidden_size;
    let both_ends = if screened && source.reads_rows() {
        match source.lm_head {
            HeadPrecision::Exact | HeadPrecision::Quantized(HeadFormat::Q8) => vocabulary,
            HeadPrecision::Quantized(HeadFormat::Q6) => vocabulary * 13 / 16, // 6 bits and a scale
            HeadPrecision::Quantized(HeadFormat::Q4) => vocabulary * 9 / 16,
        }
    } else {
        vocabulary * float * if config.tie_word_embeddings { 1 } else { 2 }
    };
    let norms = config.norm_parameters() as usize * size_of::<f32>();
    (projections + both_ends + norms) as u64
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
    let system = field(&meminfo, "MemAvailable:")?;
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

/// A line of `/proc` in kB, as bytes.
pub fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Begins a new peak of resident memory. Whether the system can (Linux): otherwise the peak is that of the whole process.
pub fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The most resident memory since [`reset_peak`].
pub fn peak() -> Option<u64> {
    statistics::peak_memory()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc() {
        let text = "MemTotal:       24683520 kB\nMemAvailable:   2 kB\nPages: 3\n";
        assert_eq!(field(text, "MemAvailable:"), Some(2048));
        assert_eq!(field(text, "Pages:"), None);
        assert_eq!(field(text, "Swap:"), None);
    }
}
