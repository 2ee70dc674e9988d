//! `QuantizedActivations`: rows of activations as integers, ready for the products with ternary weights.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use crate::{
    fingerprint::fingerprint,
    kernels::{self, Kernel, tile::TileFormat},
    quant::{ActivationCodes, Rounding},
    threads,
};

/// Rows of activations as codes in an i8, each with its sum and its factor `a`: a value is `code / a`.
#[derive(Debug)]
pub struct QuantizedActivations {
    /// (tokens, columns padded to whole tiles); the padding is 0.
    codes: Vec<i8>,
    /// Σ codes of each row.
    sums: Vec<i32>,
    /// `a` of each row: a code is `round(x · a)`.
    factors: Vec<f32>,
    padded: usize,
}

/// The integers of an input, made by the first product that needs them and shared by all that have the same input.
#[derive(Clone, Debug, Default)]
pub struct SharedActivations(Arc<OnceLock<QuantizedActivations>>);

impl SharedActivations {
    /// What was made before, or what `quantize` makes now.
    pub fn get_or_quantize(
        &self,
        quantize: impl FnOnce() -> QuantizedActivations,
    ) -> &QuantizedActivations {
        self.0.get_or_init(quantize)
    }

    /// What was made before.
    pub fn get(&self) -> Option<&QuantizedActivations> {
        self.0.get()
    }
}

impl QuantizedActivations {
    /// Quantizes `x`, rows of `in_features` values, for weights of `format`, with the kernel chosen for this machine.
    ///
    /// At the level `trace` it logs how wide rows are and the beginning of the SHA-256 of each row's codes, so that
    /// another implementation's can be compared: where codes differ, so do logits, by much more than their arithmetic.
    pub fn new(
        x: &[f32],
        in_features: usize,
        quantizer: impl Into<ActivationCodes>,
        format: TileFormat,
    ) -> Self {
        let tokens = x.len().checked_div(in_features).unwrap_or(0);
        Self::of_rows((tokens, in_features), quantizer, format, |rows, quantize| {
            x[rows.start * in_features..rows.end * in_features]
                .chunks(in_features.max(1))
                .for_each(quantize);
        })
    }

    /// As [`new`](Self::new), of rows that never lie in memory together: `visit` calls its second argument with each of
    /// some rows in turn.
    ///
    /// # Panics
    /// If it does so with fewer or more.
    pub fn of_rows(
        (tokens, in_features): (usize, usize),
        quantizer: impl Into<ActivationCodes>,
        format: TileFormat,
        visit: impl Fn(Range<usize>, &mut dyn FnMut(&[f32])) + Sync,
    ) -> Self {
        let (kernel, quantizer) = (kernels::active(), quantizer.into());
        let padded = in_features.next_multiple_of(format.cols());
        let mut rows = vec![(0f32, 0i32); tokens];
        let block = match tokens {
            0..8 => tokens.max(1), // a few microseconds
            _ => 4,
        };
        let mut codes = vec![0i8; tokens * padded];
        let pair = ((&mut codes[..], (block * padded).max(1)), (&mut rows[..], block));
        threads::for_each_chunk_pair(pair.0, pair.1, |index, codes, rows| {
            let (first, count) = (index * block, rows.len());
            let mut places = codes.chunks_mut(padded.max(1)).zip(rows);
            visit(first..first + count, &mut |x| {
                let (codes, row) = places.next().expect("a row too many");
                *row = quantize_row(kernel, x, quantizer, codes);
            });
            assert!(places.next().is_none(), "a row too few");
        });
        let (factors, sums) = rows.into_iter().unzip();
        let quantized = Self { codes, sums, factors, padded };
        if tracing::enabled!(tracing::Level::TRACE) {
            tracing::trace!(
                width = in_features,
                rows = quantized.fingerprints(in_features),
                "codes"
            );
        }
        quantized
    }

    /// The first 64 bits of the SHA-256 of each row's codes without their padding, in hexadecimal, between spaces.
    fn fingerprints(&self, in_features: usize) -> String {
        let of_row = |row: &[i8]| fingerprint(bytemuck::cast_slice::<i8, u8>(&row[..in_features]));
        let rows: Vec<String> = self.codes.chunks(self.padded.max(1)).map(of_row).collect();
        rows.join(" ")
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.sums.len()
    }

    /// All codes, row after row; rows begin [`stride`](Self::stride) codes apart.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// Codes of a row, the padding included.
    pub fn stride(&self) -> usize {
        self.padded
    }

    /// `a` of each row; NaN for a row that was not finite, whose codes are 0.
    pub fn factors(&self) -> &[f32] {
        &self.factors
    }

    /// Σ codes of each row.
    pub(crate) fn sums(&self) -> &[i32] {
        &self.sums
    }

    pub(crate) fn rows(&self, tokens: &Range<usize>) -> &[i8] {
        &self.codes[tokens.start * self.padded..tokens.end * self.padded]
    }
}

/// One row's codes, padded with 0, and its `a` and their sum; a row that is not finite has codes 0 and `a` NaN.
fn quantize_row(
    kernel: &Kernel,
    x: &[f32],
    quantizer: ActivationCodes,
    codes: &mut [i8],
) -> (f32, i32) {
    if let ActivationCodes::Int8(rounding) = quantizer {
        return kernel.quantize_row(x, rounding == Rounding::HalfUp, codes);
    }
    codes.fill(0);
    let factor = quantizer.factor(x);
    if factor.is_finite() {
        codes.iter_mut().zip(x).for_each(|(code, &x)| *code = quantizer.code(x, factor));
    }
    (factor, codes.iter().map(|&code| i32::from(code)).sum())
}
