//! The trainable variables of a model, by name.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};

use crate::fingerprint::Fnv;

/// Named variables, made as a model asks for them: each starts from its own stream of the seed, so a
/// value depends on seed and name alone and not on the order of construction.
#[derive(Debug)]
pub struct Parameters {
    vars: Mutex<BTreeMap<String, Var>>,
    seed: u64,
    device: Device,
}

impl Parameters {
    /// No variables yet; they will be on the processor.
    pub fn new(seed: u64) -> Arc<Self> {
        Self::on(&Device::Cpu, seed)
    }

    /// No variables yet; they will be on `device`, with the same first values as anywhere.
    pub fn on(device: &Device, seed: u64) -> Arc<Self> {
        Arc::new(Self { vars: Mutex::default(), seed, device: device.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `name` from `value`, converted to f32; for masters from a checkpoint.
    pub fn insert(&self, name: &str, value: &Tensor) -> Result<()> {
        let value = value.to_dtype(DType::F32)?.contiguous()?.to_device(&self.device)?;
        let var = Var::from_tensor(&value)?;
        self.lock().insert(name.to_string(), var);
        Ok(())
    }

    /// The variable `name`; if there is none yet, one that starts from the value that `make` gives, converted to f32.
    pub fn get_or_insert(&self, name: &str, make: impl FnOnce() -> Result<Tensor>) -> Result<Var> {
        if let Some(var) = self.lock().get(name) {
            return Ok(var.clone());
        }
        self.insert(name, &make()?)?;
        match self.lock().get(name) {
            Some(var) => Ok(var.clone()),
            None => bail!("parameter `{name}` is gone"),
        }
    }

    /// All variables, sorted by name.
    pub fn named(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    /// Number of trainable values.
    pub fn count(&self) -> usize {
        self.lock().values().map(|var| var.elem_count()).sum()
    }

    /// A builder whose tensors are the variables: a model loaded from it trains.
    pub fn var_builder(self: &Arc<Self>) -> VarBuilder<'static> {
        self.builder(true)
    }

    /// A builder whose tensors share the variables' memory but record no gradients: a model loaded
    /// from it evaluates, and sees every update.
    pub fn frozen_builder(self: &Arc<Self>) -> VarBuilder<'static> {
        self.builder(false)
    }

    fn builder(self: &Arc<Self>, tracked: bool) -> VarBuilder<'static> {
        let backend = Backend { parameters: self.clone(), tracked };
        VarBuilder::from_backend(Box::new(backend), DType::F32, self.device.clone())
    }

    fn get_or_init(&self, name: &str, shape: &Shape, init: Init) -> Result<Var> {
        let mut vars = self.lock();
        if let Some(var) = vars.get(name) {
            if var.shape() != shape {
                bail!("parameter `{name}`: expected {shape:?}, found {:?}", var.shape());
            }
            return Ok(var.clone());
        }
        let values = match init {
            Init::Const(value) => vec![value as f32; shape.elem_count()],
            Init::Randn { mean, stdev } => self.normal(name, shape, mean, stdev)?,
            // He initialization over the last dimension, the inputs.
            Init::Kaiming { .. } => {
                let inputs = shape.dims().last().copied().unwrap_or(1).max(1);
                self.normal(name, shape, 0., (inputs as f64).powf(-0.5))?
            }
            Init::Uniform { lo, up } => {
                let uniform =
                    Uniform::new(lo as f32, up as f32).map_err(candle_core::Error::wrap)?;
                self.sample(name, shape, uniform)
            }
        };
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, &self.device)?)?;
        vars.insert(name.to_string(), var.clone());
        Ok(var)
    }

    fn normal(&self, name: &str, shape: &Shape, mean: f64, stdev: f64) -> Result<Vec<f32>> {
        let normal = Normal::new(mean as f32, stdev as f32).map_err(candle_core::Error::wrap)?;
        Ok(self.sample(name, shape, normal))
    }

    fn sample(&self, name: &str, shape: &Shape, values: impl Distribution<f32>) -> Vec<f32> {
        // The same stream for the same name, whatever the compiler.
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(Fnv::of(name));
        (0..shape.elem_count()).map(|_| values.sample(&mut rng)).collect()
    }
}

struct Backend {
    parameters: Arc<Parameters>,
    tracked: bool,
}

impl SimpleBackend for Backend {
    fn get(&self, s: Shape, name: &str, h: Init, dtype: DType, _: &Device) -> Result<Tensor> {
        if dtype != DType::F32 {
            bail!("parameter `{name}`: parameters are f32, not {dtype:?}");
        }
        let var = self.parameters.get_or_init(name, &s, h)?;
        Ok(match self.tracked {
            true => var.as_tensor().clone(),
            false => var.as_detached_tensor(),
        })
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("parameter `{name}` was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.parameters.lock().contains_key(name)
    }
}
