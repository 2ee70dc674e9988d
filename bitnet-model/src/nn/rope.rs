//! Rotary positions: the angles of a forward pass, computed once and shared by all layers.

use candle_core::{Device, Result, Tensor};

use crate::{config::inverse_frequencies, ops};

/// The frequencies `theta^(-2i/head_dim)` of a model.
#[derive(Clone, Debug)]
pub struct RotaryEmbedding {
    inverse_frequencies: Vec<f32>,
}

/// Cosines and sines for the tokens of one forward pass, each (batch or 1, seq, head_dim / 2) f32.
#[derive(Clone, Debug)]
pub struct Angles {
    cos: Tensor,
    sin: Tensor,
}

impl RotaryEmbedding {
    /// `head_dim` is even.
    pub fn new(head_dim: usize, theta: f64) -> Self {
        Self { inverse_frequencies: inverse_frequencies(head_dim, theta) }
    }

    /// Angles for `positions`, (rows, seq) row-major.
    pub fn angles(&self, positions: &[usize], rows: usize, device: &Device) -> Result<Angles> {
        let half = self.inverse_frequencies.len();
        // The angle is an f32 product, as in the reference; its sine and cosine are then exact.
        let angles = || {
            positions.iter().flat_map(|&position| {
                self.inverse_frequencies.iter().map(move |f| f64::from(position as f32 * f))
            })
        };
        let shape = (rows, positions.len() / rows.max(1), half);
        let cos: Vec<f32> = angles().map(|angle| angle.cos() as f32).collect();
        let sin: Vec<f32> = angles().map(|angle| angle.sin() as f32).collect();
        Ok(Angles {
            cos: Tensor::from_vec(cos, shape, device)?,
            sin: Tensor::from_vec(sin, shape, device)?,
        })
    }
}

impl Angles {
    /// Rotates `x` (batch, seq, heads · head_dim): (batch, seq, heads, head_dim).
    pub fn rotate(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        ops::rope(x, heads, &self.cos, &self.sin)
    }
}
