//! A linear factory that lets one layer's queries, keys and values be looked at.

use std::sync::{Arc, Mutex, PoisonError};

use bitnet_model::nn::{LinearFactory, LinearSpec, Projection, Projections};
use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::Error;

/// Queries, keys and values, each (batch, seq, heads · head_dim) f32, as the projections make them: before the rotary
/// embedding.
pub type States = [Tensor; 3];

/// Where the states of the last forward pass are left; a clone shares the place.
#[derive(Clone, Debug, Default)]
pub struct Tap(Arc<Mutex<Option<States>>>);

impl Tap {
    fn put(&self, states: States) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(states);
    }

    /// Takes the states away.
    ///
    /// # Errors
    /// No forward pass since the last time.
    pub fn take(&self) -> crate::Result<States> {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        states.ok_or_else(|| Error::Input("the tapped layer has not been computed".into()))
    }
}

/// Any factory, with a [`Tap`] at one layer's `q_proj`, `k_proj` and `v_proj`.
pub struct Tapped<'a> {
    base: &'a dyn LinearFactory,
    layer: usize,
    tap: Tap,
}

impl<'a> Tapped<'a> {
    /// Taps the block `layer`, counted from 0.
    pub fn new(base: &'a dyn LinearFactory, layer: usize, tap: Tap) -> Self {
        Self { base, layer, tap }
    }
}

impl LinearFactory for Tapped<'_> {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        self.base.linear(spec, vb)
    }

    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let base = self.base.linears(specs, vb)?;
        let is_attention = specs.iter().map(|spec| spec.name).eq(["q_proj", "k_proj", "v_proj"]);
        let is_layer = vb.prefix().ends_with(&format!("layers.{}.self_attn", self.layer));
        Ok(match is_attention && is_layer {
            true => Arc::new(TappedProjections { base, tap: self.tap.clone() }),
            false => base,
        })
    }

    fn weight_bytes(&self) -> Option<usize> {
        self.base.weight_bytes()
    }
}

struct TappedProjections {
    base: Arc<dyn Projections>,
    tap: Tap,
}

impl Projections for TappedProjections {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let states = self.base.forward(x)?;
        if let [q, k, v] = &states[..] {
            self.tap.put([q.clone(), k.clone(), v.clone()]);
        }
        Ok(states)
    }
}
