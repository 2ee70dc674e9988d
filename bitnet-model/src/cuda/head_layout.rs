//! An output head of few bits in the order in which a warp reads it: `head.cu` describes it.
//!
//! The words are those of the CPU's lines, four bytes of a row each; only their order is another, and codes of 8 bits are
//! signed.

use super::launch::head_groups;
use crate::{
    head_weights::HeadWeights,
    kernels::head::{HeadBand, HeadFormat, Line},
    threads,
};

/// Lanes of a warp, 2 · row + half.
const LANES: usize = 32;

/// A head in the device's order, padded to whole bands and to pairs of groups.
#[derive(Debug)]
pub struct HeadBands {
    /// (bands, pairs of groups, vectors of a lane's words, 32 lanes).
    pub words: Vec<u32>,
    /// (bands, 16) f32 of 8 bits; else (bands, groups, 16) bfloat16. Bytes.
    pub scales: Vec<u8>,
}

impl HeadBands {
    /// Brings a head into the device's order.
    pub fn new(head: &HeadWeights) -> Self {
        let (_, cols) = head.shape();
        let (format, groups) = (head.format(), head_groups(cols));
        let band_words = groups / 2 * LANES * format.lines_per_group();
        let mut words = vec![0; head.bands() * band_words];
        threads::for_each_chunk(&mut words, band_words.max(1), |band, words| {
            fill_band(format, head.band(band), words);
        });
        let mut scales = Vec::new();
        for band in 0..head.bands() {
            match head.band(band) {
                HeadBand::Q8 { scales: rows, .. } => {
                    scales.extend(rows.iter().flat_map(|scale| scale.to_ne_bytes()));
                }
                HeadBand::Q6 { scales: of_groups, .. } | HeadBand::Q4 { scales: of_groups, .. } => {
                    let padding = vec![[0; 16]; groups - of_groups.len()];
                    let all = of_groups.iter().chain(&padding).flatten();
                    scales.extend(all.flat_map(|scale| scale.to_ne_bytes()));
                }
            }
        }
        Self { words, scales }
    }
}

/// The lines of a group of which a lane has a word, vector after vector.
fn vectors(format: HeadFormat) -> &'static [&'static [usize]] {
    match format {
        HeadFormat::Q8 => &[&[0, 1, 2, 3], &[4, 5, 6, 7]],
        // Low bits of all 32 columns, then their high ones.
        HeadFormat::Q6 => &[&[0, 1, 3, 4], &[2, 5]],
        HeadFormat::Q4 => &[&[0, 1, 2, 3]],
    }
}

fn fill_band(format: HeadFormat, band: HeadBand<'_>, words: &mut [u32]) {
    let (HeadBand::Q8 { lines, .. } | HeadBand::Q6 { lines, .. } | HeadBand::Q4 { lines, .. }) =
        band;
    // Takes 128 away from a byte.
    let sign = if format == HeadFormat::Q8 { 0x8080_8080 } else { 0 };
    let groups = Vec::from_iter(lines.chunks(format.lines_per_group()));
    let mut at = 0;
    for pair in groups.chunks(2) {
        for vector in vectors(format) {
            for lane in 0..LANES {
                let words = &mut words[at..][..vector.len()];
                at += vector.len();
                // Behind the last group: zeros, which meet activations that are 0.
                let Some(lines) = pair.get(lane % 2) else { continue };
                for (word, line) in words.iter_mut().zip(*vector) {
                    *word = word_of(&lines[*line], lane / 2) ^ sign;
                }
            }
        }
    }
}

fn word_of(line: &Line, row: usize) -> u32 {
    u32::from_le_bytes(line.as_chunks().0[row])
}
