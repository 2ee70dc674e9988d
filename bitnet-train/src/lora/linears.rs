//! The linear factory of LoRA: any other factory's projections, with trainable pairs beside them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use bitnet_model::{
    activations::SharedActivations,
    adapter::AdapterConfig,
    nn::{BitLinear, BitLinears, LinearFactory, LinearSpec, Projection, Projections},
    ops::{gemm::Precision, ternary_matmul_part},
};
use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

use super::{
    noise::Step,
    product::{Pass, TernaryBase, TrainedPair, low_rank},
};
use crate::parameters::Parameters;

/// What makes the frozen projections.
#[derive(Clone, Copy)]
pub enum Base<'a> {
    /// Packed ones: a product and its pair are one operation, and projections of one input share its integers.
    Packed(&'a BitLinears),
    /// Any others.
    Other(&'a dyn LinearFactory),
}

/// Frozen projections of one input.
#[derive(Clone)]
enum Frozen {
    Packed(BitLinear),
    Other(Arc<dyn Projections>),
}

/// Makes the projections of a model that is trained, and of one that evaluates it. Both share the frozen base, which is
/// loaded once, and the pairs.
pub struct LoraLinears<'a> {
    base: Base<'a>,
    settings: Arc<Settings>,
    /// By the paths of the projections.
    loaded: Mutex<BTreeMap<String, Frozen>>,
}

/// What all projections have in common.
#[derive(Debug)]
struct Settings {
    config: AdapterConfig,
    parameters: Arc<Parameters>,
    step: Step,
    backward: Precision,
}

impl<'a> LoraLinears<'a> {
    /// Pairs as `config` says, made among `parameters`; what they drop follows `step`. Products of the backward pass are of
    /// this precision (those through the base as its factory says).
    pub fn new(
        base: Base<'a>,
        config: AdapterConfig,
        parameters: Arc<Parameters>,
        step: Step,
        backward: Precision,
    ) -> Self {
        let settings = Arc::new(Settings { config, parameters, step, backward });
        Self { base, settings, loaded: Mutex::default() }
    }

    /// The factory of the model that is trained.
    pub fn trained(&self) -> LoraView<'_, 'a> {
        LoraView { linears: self, tracked: true }
    }

    /// The factory of the model that records no gradients.
    pub fn frozen(&self) -> LoraView<'_, 'a> {
        LoraView { linears: self, tracked: false }
    }

    /// The frozen projections `parts` of one input.
    fn load(&self, parts: &[(LinearSpec, VarBuilder)]) -> Result<Frozen> {
        let key = parts.iter().map(|(_, vb)| vb.prefix()).collect::<Vec<_>>().join(" ");
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(frozen) = loaded.get(&key) {
            return Ok(frozen.clone());
        }
        let each = |factory: &dyn LinearFactory| -> Result<Frozen> {
            let each = parts.iter().map(|(spec, vb)| factory.linear(*spec, vb.clone()));
            Ok(Frozen::Other(Arc::new(each.collect::<Result<Vec<Projection>>>()?)))
        };
        let frozen = match self.base {
            Base::Packed(factory) => match factory.stacked(parts)? {
                Some(linear) if linear.takes_input_as_it_is() => Frozen::Packed(linear),
                Some(linear) => Frozen::Other(Arc::new(linear)),
                None => each(factory)?,
            },
            Base::Other(factory) => each(factory)?,
        };
        loaded.insert(key, frozen.clone());
        Ok(frozen)
    }
}

/// Either factory of a [`LoraLinears`].
#[derive(Clone, Copy)]
pub struct LoraView<'b, 'a> {
    linears: &'b LoraLinears<'a>,
    tracked: bool,
}

impl LoraView<'_, '_> {
    fn adapted(&self, parts: &[(LinearSpec, VarBuilder)]) -> Result<Adapted> {
        let pairs = parts.iter().map(|(spec, vb)| self.pair(*spec, vb.prefix()));
        let (base, settings) = (self.linears.load(parts)?, self.linears.settings.clone());
        let pairs = pairs.collect::<Result<_>>()?;
        Ok(Adapted { base, pairs, settings, tracked: self.tracked })
    }

    fn pair(&self, spec: LinearSpec, path: String) -> Result<Option<(String, TrainedPair)>> {
        let Settings { config, parameters, .. } = &*self.linears.settings;
        trained_pair(config, parameters, (spec, &path), self.tracked)
            .map(|pair| pair.map(|pair| (path, pair)))
    }
}

/// The pair of the projection `spec` at `path`, made among `parameters` if it is not there: `A` uniform within
/// `±1/√in_features` (PEFT's Kaiming initialization with a = √5), `B` zero. `None` if `config` has none for it.
pub(super) fn trained_pair(
    config: &AdapterConfig,
    parameters: &Arc<Parameters>,
    (spec, path): (LinearSpec, &str),
    tracked: bool,
) -> Result<Option<TrainedPair>> {
    let Some(pair) = config.pair(path).map_err(candle_core::Error::msg)? else { return Ok(None) };
    let LinearSpec { in_features, out_features, .. } = spec;
    let vb = match tracked {
        true => parameters.var_builder(),
        false => parameters.frozen_builder(),
    };
    let bound = (in_features as f64).powf(-0.5);
    let get = |shape, matrix: &str, init| {
        vb.get_with_hints_dtype(shape, &format!("{path}.{matrix}.weight"), init, DType::F32)
    };
    let uniform = Init::Uniform { lo: -bound, up: bound };
    Ok(Some(TrainedPair {
        lora_a: get((pair.rank, in_features), "lora_A", uniform)?,
        lora_b: get((out_features, pair.rank), "lora_B", Init::Const(0.))?,
        scale: pair.scale,
    }))
}

impl LinearFactory for LoraView<'_, '_> {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(Arc::new(self.adapted(&[(spec, vb)])?))
    }

    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let parts = Vec::from_iter(specs.iter().map(|&spec| (spec, vb.pp(spec.name))));
        Ok(Arc::new(self.adapted(&parts)?))
    }
}

/// Frozen projections of one input, each with its path and pair if it has one.
struct Adapted {
    base: Frozen,
    pairs: Vec<Option<(String, TrainedPair)>>,
    settings: Arc<Settings>,
    tracked: bool,
}

impl Adapted {
    /// The product of the pair at `path`, with that of its base: that of the forward pass, if this is when a block is computed
    /// again and it was kept.
    fn product(
        &self,
        x: &Tensor,
        (path, pair): (&str, &TrainedPair),
        base: Option<TernaryBase>,
    ) -> Result<Tensor> {
        let kept = self.settings.step.kept();
        let known = kept.filter(|_| self.tracked).and_then(|kept| kept.take(path));
        let product = low_rank(x, pair, base, self.pass(path), known)?;
        if let (Some(kept), false) = (kept, self.tracked) {
            kept.keep(path, &product);
        }
        Ok(product.y)
    }

    /// How the pair of `path` is computed now.
    fn pass(&self, path: &str) -> Pass {
        let Settings { config, step, backward, .. } = &*self.settings;
        let stream = (config.dropout > 0.).then(|| step.stream(path)).flatten();
        Pass { dropout: stream.map(|stream| (config.dropout, stream)), backward: *backward }
    }
}

impl Projections for Adapted {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        match &self.base {
            Frozen::Packed(linear) => {
                let (product, input) = (linear.product(), SharedActivations::default());
                let each = self.pairs.iter().enumerate().map(|(index, pair)| match pair {
                    Some((path, pair)) => {
                        let (weights, input) = (linear.weights().clone(), input.clone());
                        let base = TernaryBase { weights, index, product, input };
                        self.product(x, (path, pair), Some(base))
                    }
                    None => ternary_matmul_part(x, linear.weights(), index, product, &input),
                });
                each.collect()
            }
            Frozen::Other(base) => {
                let each = base.forward(x)?.into_iter().zip(&self.pairs);
                let each = each.map(|(y, pair)| match pair {
                    Some((path, pair)) => y + self.product(x, (path, pair), None)?,
                    None => Ok(y),
                });
                each.collect()
            }
        }
    }
}

impl Module for Adapted {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match <[Tensor; 1]>::try_from(Projections::forward(self, x)?) {
            Ok([y]) => Ok(y),
            Err(_) => bail!("one projection was asked for, and there are several"),
        }
    }
}
