//! AdamW over named parameters, with f32 moments, decay groups and a state that can be saved.
//!
//! With gradient `g` and decoupled decay `λ`, in the order and f32 arithmetic of `torch.optim.AdamW`:
//!
//! ```text
//! p ← p · (1 − lr·λ)
//! m ← m + (1 − β₁)·(g − m)
//! v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! All of it is one pass over the memory of a parameter, in parallel and in place.

use std::{path::Path, sync::Mutex};

#[cfg(feature = "cuda")]
use bitnet_model::cuda;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor, Var, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Rates, moments::Moments};
use crate::{
    Error, Result,
    checkpoint::tensors::{self, F32View, TensorFile, write_tensors},
};

/// What the moments are called in torch's state.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// Elements updated as one task.
const CHUNK: usize = 1 << 14;

/// Which parameters decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// Matrices: the projections and the embedding; no norms and biases.
    Matrices,
    /// Every parameter, as `torch.optim.AdamW` without groups.
    All,
}

impl Decay {
    fn applies_to(self, parameter: &Tensor) -> bool {
        match self {
            Self::Matrices => parameter.rank() >= 2,
            Self::All => true,
        }
    }
}

/// What stays the same over a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Which parameters decay.
    pub decay: Decay,
}

/// What one update takes beside the gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Learning rate and weight decay.
    pub rates: Rates,
    /// Gradients are multiplied by it first: [`clip_factor`](super::clip_factor).
    pub grad_factor: f64,
}

/// The optimizer: parameters, their moments and the number of updates made.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: Vec<Parameter>,
    updates: u64,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    decays: bool,
    moments: Moments,
}

impl AdamW {
    /// An optimizer of `parameters`, which must be f32 and contiguous, as every fresh [`Var`] is.
    pub fn new(parameters: &[(String, Var)], config: AdamWConfig) -> Result<Self> {
        let parameters = parameters
            .iter()
            .map(|(name, var)| {
                if var.dtype() != DType::F32 {
                    return Err(Error::Input(format!(
                        "parameter `{name}` is {:?}, not f32",
                        var.dtype()
                    )));
                }
                Ok(Parameter {
                    name: name.clone(),
                    var: var.clone(),
                    decays: config.decay.applies_to(var),
                    moments: Moments::new(var)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, parameters, updates: 0 })
    }

    /// Number of updates made.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Updates every parameter; `gradients` has one for each, in the order given to [`AdamW::new`].
    pub fn step(&mut self, gradients: &[Tensor], update: Update) -> Result<()> {
        if gradients.len() != self.parameters.len() {
            let (found, expected) = (gradients.len(), self.parameters.len());
            return Err(Error::Input(format!("{found} gradients for {expected} parameters")));
        }
        self.updates += 1;
        let AdamWConfig { beta1, beta2, eps, .. } = self.config;
        let Rates { lr, weight_decay } = update.rates;
        let updates = self.updates as f64;
        // Computed in f64 and rounded once, as torch's Python scalars are.
        let mut coefficients = Coefficients {
            grad_factor: update.grad_factor as f32,
            keep: 1.,
            one_minus_beta1: (1. - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1. - beta2) as f32,
            bias2_root: (1. - beta2.powf(updates)).sqrt() as f32,
            eps: eps as f32,
            step_size: (lr / (1. - beta1.powf(updates))) as f32,
        };
        for (parameter, gradient) in self.parameters.iter_mut().zip(gradients) {
            coefficients.keep = if parameter.decays { (1. - lr * weight_decay) as f32 } else { 1. };
            let op = AdamWOp { coefficients, moments: Mutex::new(&mut parameter.moments) };
            parameter.var.inplace_op2(&gradient.contiguous()?, &op)?;
        }
        Ok(())
    }

    /// Writes the moments as safetensors: `NAME.exp_avg` and `NAME.exp_avg_sq`, named as in torch's state.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::with_capacity(2 * self.parameters.len());
        for Parameter { name, var, moments, .. } in &self.parameters {
            for (moment, values) in MOMENTS.into_iter().zip(moments.values()?) {
                tensors.push((format!("{name}.{moment}"), F32View { shape: var.dims(), values }));
            }
        }
        write_tensors(path, tensors, ("updates", self.updates.to_string()))
    }

    /// Reads what [`AdamW::save`] wrote.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let bytes = tensors::read(path)?;
        let file = TensorFile::parse(path, &bytes)?;
        let updates = file.metadata("updates")?;
        for Parameter { name, var, moments, .. } in &mut self.parameters {
            let read = |moment| file.read(&format!("{name}.{moment}"), var.dims());
            moments.set([read(MOMENTS[0])?, read(MOMENTS[1])?])?;
        }
        self.updates = updates;
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Coefficients {
    grad_factor: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    bias2_root: f32,
    eps: f32,
    step_size: f32,
}

/// The update of one parameter in place; the moments are the op's own.
struct AdamWOp<'a> {
    coefficients: Coefficients,
    moments: Mutex<&'a mut Moments>,
}

impl InplaceOp2 for AdamWOp<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        parameter_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        let (CpuStorage::F32(parameter), CpuStorage::F32(gradient)) = (parameter, gradient) else {
            bail!("{} needs an f32 parameter and gradient", self.name())
        };
        self.check(parameter_layout, gradient_layout)?;
        let (Some((start, end)), Some((gradient_start, gradient_end))) =
            (parameter_layout.contiguous_offsets(), gradient_layout.contiguous_offsets())
        else {
            bail!("{} needs a contiguous parameter and gradient", self.name())
        };
        let Ok(mut moments) = self.moments.lock() else { bail!("{} panicked before", self.name()) };
        let Some([first, second]) = moments.on_cpu() else {
            bail!("{}: the moments are on a device, the parameter is not", self.name())
        };
        (parameter[start..end].par_chunks_mut(CHUNK))
            .zip(gradient[gradient_start..gradient_end].par_chunks(CHUNK))
            .zip(first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK)))
            .for_each(|((parameter, gradient), (first, second))| {
                self.coefficients.update(parameter, gradient, first, second);
            });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        parameter: &mut CudaStorage,
        parameter_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        self.check(parameter_layout, gradient_layout)?;
        let Ok(mut moments) = self.moments.lock() else { bail!("{} panicked before", self.name()) };
        let Moments::Cuda(moments) = &mut **moments else {
            bail!("{}: the parameter is on a device, the moments are not", self.name())
        };
        let (parameter, gradient) = ((parameter, parameter_layout), (gradient, gradient_layout));
        cuda::ops::adamw(parameter, gradient, moments, self.coefficients.in_order())
    }

    bitnet_model::no_metal_fwd!(in place 2);
}

impl AdamWOp<'_> {
    /// Refuses a gradient of another shape.
    fn check(&self, parameter: &Layout, gradient: &Layout) -> candle_core::Result<()> {
        let (parameter, gradient) = (parameter.shape(), gradient.shape());
        if parameter != gradient {
            bail!("{}: parameter {parameter:?}, gradient {gradient:?}", self.name())
        }
        Ok(())
    }
}

impl Coefficients {
    /// As the kernel takes them.
    #[cfg(feature = "cuda")]
    fn in_order(&self) -> [f32; 8] {
        let Self { grad_factor, keep, one_minus_beta1, beta2, one_minus_beta2, .. } = *self;
        let Self { bias2_root, eps, step_size, .. } = *self;
        [grad_factor, keep, one_minus_beta1, beta2, one_minus_beta2, bias2_root, eps, step_size]
    }

    fn update(
        &self,
        parameter: &mut [f32],
        gradient: &[f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        for (((p, &g), m), v) in parameter.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * self.grad_factor;
            *m += self.one_minus_beta1 * (g - *m);
            *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
            let root = v.sqrt() / self.bias2_root + self.eps;
            *p = *p * self.keep - self.step_size * *m / root;
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const CONFIG: AdamWConfig =
        AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: Decay::All };

    fn update(lr: f64) -> Update {
        Update { rates: Rates { lr, weight_decay: 0.1 }, grad_factor: 0.5 }
    }

    fn parameters() -> Vec<(String, Var)> {
        let var = |shape: &[usize]| Var::randn(0f32, 1., shape, &Device::Cpu).unwrap();
        vec![("matrix".into(), var(&[130, 257])), ("norm".into(), var(&[9]))]
    }

    fn gradients(parameters: &[(String, Var)]) -> Vec<Tensor> {
        parameters.iter().map(|(_, var)| var.randn_like(0., 2.).unwrap()).collect()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// The published formulas in f64: Loshchilov and Hutter, algorithm 2.
    #[test]
    fn equals_the_formula_over_many_steps() {
        for decay in [Decay::All, Decay::Matrices] {
            let parameters = parameters();
            let mut adamw = AdamW::new(&parameters, AdamWConfig { decay, ..CONFIG }).unwrap();
            let mut expected: Vec<Vec<[f64; 3]>> = parameters
                .iter()
                .map(|(_, var)| values(var).iter().map(|&p| [f64::from(p), 0., 0.]).collect())
                .collect();
            for t in 1..=8 {
                let lr = 1e-2 / f64::from(t);
                let gradients = gradients(&parameters);
                adamw.step(&gradients, update(lr)).unwrap();
                for (index, gradient) in gradients.iter().enumerate() {
                    let decay = if index == 0 || decay == Decay::All { 0.1 } else { 0. };
                    for ([p, m, v], g) in expected[index].iter_mut().zip(values(gradient)) {
                        let g = f64::from(g) * 0.5;
                        *m = 0.9 * *m + 0.1 * g;
                        *v = 0.95 * *v + 0.05 * g * g;
                        let (m_hat, v_hat) =
                            (*m / (1. - 0.9f64.powi(t)), *v / (1. - 0.95f64.powi(t)));
                        *p -= lr * (m_hat / (v_hat.sqrt() + 1e-8) + decay * *p);
                    }
                }
            }
            for ((_, var), expected) in parameters.iter().zip(expected) {
                for (p, [expected, ..]) in values(var).iter().zip(expected) {
                    // Eight updates of at most 1e-2 on numbers of about 1: 8 roundings of 6e-8 and their like.
                    assert!((f64::from(*p) - expected).abs() < 2e-6, "{p} {expected}");
                }
            }
        }
    }

    /// By hand: the first step moves by `lr · sign(g)` (but for eps), after the decay.
    #[test]
    fn the_first_step_is_the_sign() {
        let var = Var::new(&[[2f32, -1.]], &Device::Cpu).unwrap();
        let mut adamw = AdamW::new(&[("w".into(), var.clone())], CONFIG).unwrap();
        let gradient = Tensor::new(&[[1e-3f32, -7.]], &Device::Cpu).unwrap();
        adamw.step(&[gradient], update(0.1)).unwrap();
        let found = values(&var);
        assert!(
            (found[0] - (2. * 0.99 - 0.1)).abs() < 3e-6 && (found[1] - (-0.99 + 0.1)).abs() < 1e-6,
            "{found:?}"
        );
    }

    #[test]
    fn a_saved_state_resumes_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        let parameters = parameters();
        let mut adamw = AdamW::new(&parameters, CONFIG).unwrap();
        adamw.step(&gradients(&parameters), update(1e-2)).unwrap();
        adamw.save(&path).unwrap();
        let copies: Vec<_> = parameters
            .iter()
            .map(|(name, var)| {
                (name.clone(), Var::from_tensor(&var.copy().unwrap().detach()).unwrap())
            })
            .collect();
        let mut resumed = AdamW::new(&copies, CONFIG).unwrap();
        resumed.load(&path).unwrap();
        let gradients = gradients(&parameters);
        adamw.step(&gradients, update(1e-2)).unwrap();
        resumed.step(&gradients, update(1e-2)).unwrap();
        assert_eq!(resumed.updates(), 2);
        for ((_, var), (_, copy)) in parameters.iter().zip(&copies) {
            assert_ne!(var.id(), copy.id());
            assert_eq!(values(var), values(copy));
        }
    }

    #[test]
    fn wrong_gradients_are_refused() {
        let parameters = parameters();
        let mut adamw = AdamW::new(&parameters, CONFIG).unwrap();
        let gradients = gradients(&parameters);
        assert!(adamw.step(&gradients[..1], update(1e-2)).is_err());
        let swapped = [gradients[1].clone(), gradients[0].clone()];
        assert!(adamw.step(&swapped, update(1e-2)).is_err());
        let half = Var::zeros(3, DType::F16, &Device::Cpu).unwrap();
        let message = AdamW::new(&[("w".into(), half)], CONFIG).unwrap_err().to_string();
        assert!(message.contains("`w` is F16"), "{message}");
    }
}
