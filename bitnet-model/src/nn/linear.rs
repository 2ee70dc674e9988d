//! The linear factory: the model asks it for every projection, so packed inference, training with
//! quantization and adapters are factories, not copies of the model.

use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::RmsNorm;
use crate::{adapter::RowAdapters, ops::dense_matmul};

/// A projection `(…, in_features) → (…, out_features)`, f32 in and out.
pub type Projection = Arc<dyn Module + Send + Sync>;

/// Projections of one input, in the order of their specs.
pub trait Projections: Send + Sync {
    /// `x` (…, in_features) → one (…, out_features) each, f32; rows of the result may be views into wider rows.
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>>;

    /// The projections of `norm(x)`. What can do both at once does so here.
    fn forward_normed(&self, x: &Tensor, norm: &RmsNorm) -> Result<Vec<Tensor>> {
        self.forward(&norm.forward(x)?)
    }
}

/// The projections `names` of `norm(x)`, or of `x`, with the adapters of the batch's rows.
pub(super) fn project<const N: usize>(
    (projections, names): (&dyn Projections, [&str; N]),
    x: &Tensor,
    norm: Option<&RmsNorm>,
    adapters: RowAdapters<'_>,
) -> Result<[Tensor; N]> {
    let projected = match norm {
        // Adapters want the normalized input itself.
        Some(norm) if !adapters.is_empty() => {
            let x = norm.forward(x)?;
            adapters.add_all(names, &x, projections.forward(&x)?)?
        }
        Some(norm) => projections.forward_normed(x, norm)?,
        None => adapters.add_all(names, x, projections.forward(x)?)?,
    };
    let found = projected.len();
    match projected.try_into() {
        Ok(projected) => Ok(projected),
        Err(_) => bail!("{found} projections for {names:?}"),
    }
}

impl Projections for Vec<Projection> {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        self.iter().map(|projection| projection.forward(x)).collect()
    }
}

/// What the model wants: which projection, and its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` or `down_proj`.
    pub name: &'static str,
    /// Size of the last dimension of the input.
    pub in_features: usize,
    /// Size of the last dimension of the output.
    pub out_features: usize,
    /// Whether the checkpoint has a bias for it.
    pub bias: bool,
}

/// Makes the projections of a model.
pub trait LinearFactory {
    /// Loads the projection `spec`; `vb` stands at its name: `model.layers.0.self_attn.q_proj`.
    ///
    /// # Errors
    /// A tensor that is absent, has another shape, or holds impossible values.
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection>;

    /// Loads projections of the same input, each at its name below `vb`. A factory that can do more with them together
    /// than one by one does so here.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let each = specs.iter().map(|&spec| self.linear(spec, vb.pp(spec.name)));
        Ok(Arc::new(each.collect::<Result<Vec<Projection>>>()?))
    }

    /// Bytes of the weights loaded so far, all of which every token reads; `None` if they are not counted.
    fn weight_bytes(&self) -> Option<usize> {
        None
    }
}

/// `y = x·Wᵀ + b` with dense weights: full-precision models, and the output head of all.
#[derive(Clone, Debug)]
pub struct DenseLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl DenseLinear {
    /// `weight` (out_features, in_features) f32 or bf16, `bias` (out_features) f32.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight, if there is no bias beside it.
    pub(super) fn plain_weight(&self) -> Option<&Tensor> {
        self.bias.is_none().then_some(&self.weight)
    }

    /// Bytes of the weight.
    pub(super) fn weight_bytes(&self) -> usize {
        self.weight.elem_count() * self.weight.dtype().size_in_bytes()
    }

    /// Loads `weight` in the builder's dtype and `bias` as f32.
    pub fn load(spec: LinearSpec, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(
            (spec.out_features, spec.in_features),
            "weight",
            candle_nn::init::DEFAULT_KAIMING_NORMAL,
        )?;
        let bias = match spec.bias {
            true => {
                let zeros = candle_nn::Init::Const(0.);
                Some(vb.get_with_hints_dtype(spec.out_features, "bias", zeros, DType::F32)?)
            }
            false => None,
        };
        Ok(Self::new(weight, bias))
    }
}

impl Module for DenseLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = dense_matmul(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// The factory of full-precision models.
#[derive(Clone, Copy, Debug)]
pub struct DenseLinears;

impl LinearFactory for DenseLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(Arc::new(DenseLinear::load(spec, vb)?))
    }
}
