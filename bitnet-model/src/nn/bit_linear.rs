//! `BitLinear`: a projection with ternary weights and int8 activations (arXiv:2402.17764).

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{LinearFactory, LinearSpec, Projection, Projections, RmsNorm};
use crate::{
    config::{Quantization, ScaleConvention, WeightForm},
    kernels::TileFormat,
    ops::ternary_matmul,
    packed::{PackedError, PackedSource},
    pages::Arena,
    quant::Rounding,
    storage::with_slice,
    weights::TernaryWeight,
};

/// `y = (int8(x)·codesᵀ) · scale`, after the projection's own norm if it has one. Of several matrices with the same input
/// the results lie side by side.
#[derive(Clone, Debug)]
pub struct BitLinear {
    weights: Arc<[TernaryWeight]>,
    rounding: Rounding,
    input_norm: Option<RmsNorm>,
}

impl BitLinear {
    /// A projection that rounds activations by `rounding`.
    pub fn new(weight: TernaryWeight, rounding: Rounding, input_norm: Option<RmsNorm>) -> Self {
        Self { weights: Arc::new([weight]), rounding, input_norm }
    }

    /// The packed weights.
    pub fn weights(&self) -> &[TernaryWeight] {
        &self.weights
    }
}

impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.input_norm {
            Some(norm) => ternary_matmul(&norm.forward(x)?, &self.weights, self.rounding),
            None => ternary_matmul(x, &self.weights, self.rounding),
        }
    }
}

impl Projections for BitLinear {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let y = Module::forward(self, x)?;
        let mut first = 0;
        let parts = self.weights.iter().map(|weight| {
            let part = y.narrow(D::Minus1, first, weight.out_features());
            first += weight.out_features();
            part
        });
        parts.collect()
    }
}

/// The factory of packed inference: every projection is a [`BitLinear`].
#[derive(Debug)]
pub struct BitLinears {
    quantization: Quantization,
    format: TileFormat,
    codes: Option<Arc<dyn PackedSource>>,
    arena: Arena,
    /// Of the weights loaded so far.
    bytes: AtomicUsize,
}

impl BitLinears {
    /// Loads projections quantized like this, into memory of large pages.
    pub fn new(quantization: Quantization) -> Self {
        let (format, arena) = (TileFormat::default(), Arena::default());
        Self { quantization, format, codes: None, arena, bytes: AtomicUsize::new(0) }
    }

    /// With weights in memory in this format; results do not depend on it.
    pub fn with_format(self, format: TileFormat) -> Self {
        Self { format, ..self }
    }

    /// The same factory, which reads packed codes piece by piece from `codes` and not as tensors.
    pub fn reading(self, codes: Arc<dyn PackedSource>) -> Self {
        Self { codes: Some(codes), ..self }
    }

    /// How the projections are quantized.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// [`read_weight`](Self::read_weight), counted.
    fn load_weight(&self, spec: LinearSpec, vb: VarBuilder) -> Result<TernaryWeight> {
        let weight = self.read_weight(spec, vb)?;
        self.bytes.fetch_add(weight.bytes(), Ordering::Relaxed);
        Ok(weight)
    }

    /// Loads packed codes `weight` (out_features / 4, in_features) u8 with `weight_scale`, or ternarizes a float
    /// `weight` (out_features, in_features).
    fn read_weight(&self, spec: LinearSpec, vb: VarBuilder) -> Result<TernaryWeight> {
        let Quantization { weights, rounding, .. } = self.quantization;
        let shape @ (out_features, in_features) = (spec.out_features, spec.in_features);
        let name = format!("{}.weight", vb.prefix());
        let refuse = |reason: String| candle_core::Error::Msg(format!("tensor `{name}`: {reason}"));
        let WeightForm::Packed(convention) = weights else {
            let latent =
                vb.get_with_hints_dtype(shape, "weight", Default::default(), DType::F32)?;
            let weight = with_slice::<f32, _>(&latent, |latent| {
                if let Some(at) = latent.iter().position(|w| !w.is_finite()) {
                    let (row, col) = (at / in_features, at % in_features);
                    return Err(refuse(format!("row {row}, column {col} is {}", latent[at])));
                }
                Ok(TernaryWeight::from_latent(latent, shape, rounding, self.format))
            })?;
            return weight.into_pages(&self.arena).map_err(candle_core::Error::wrap);
        };
        let scale = vb.get_with_hints_dtype(1, "weight_scale", Default::default(), DType::F32)?;
        let scale = scale.to_vec1::<f32>()?[0];
        if !(scale.is_finite() && scale > 0.) {
            return Err(refuse(format!("weight_scale is {scale}, not a positive number")));
        }
        let scale = match convention {
            ScaleConvention::Multiply => scale,
            ScaleConvention::Divide => 1. / scale,
        };
        let refuse_packed = |error| match error {
            PackedError::Read(error) => error,
            error => refuse(error.to_string()),
        };
        if let Some(codes) = &self.codes {
            let source = (&**codes, &name[..]);
            return TernaryWeight::read_packed(source, shape, scale, self.format, &self.arena)
                .map_err(refuse_packed);
        }
        let packed = (out_features.div_ceil(4), in_features);
        let codes = vb.get_with_hints_dtype(packed, "weight", Default::default(), DType::U8)?;
        with_slice::<u8, _>(&codes, |codes| {
            TernaryWeight::from_packed(codes, shape, scale, self.format).map_err(refuse_packed)
        })?
        .into_pages(&self.arena)
        .map_err(candle_core::Error::wrap)
    }
}

impl LinearFactory for BitLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        let Quantization { rounding, input_norm_eps, .. } = self.quantization;
        let input_norm = match input_norm_eps {
            Some(eps) => Some(RmsNorm::load(spec.in_features, eps, vb.pp("rms_norm"))?),
            None => None,
        };
        Ok(Arc::new(BitLinear::new(self.load_weight(spec, vb)?, rounding, input_norm)))
    }

    /// One [`BitLinear`]: the input is quantized once and the matrices are one parallel region. Norms of their own keep
    /// projections apart.
    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let Quantization { rounding, input_norm_eps, .. } = self.quantization;
        if input_norm_eps.is_some() {
            let each = specs.iter().map(|&spec| self.linear(spec, vb.pp(spec.name)));
            return Ok(Arc::new(each.collect::<Result<Vec<Projection>>>()?));
        }
        let weights = specs.iter().map(|&spec| self.load_weight(spec, vb.pp(spec.name)));
        let weights = weights.collect::<Result<Vec<_>>>()?.into();
        Ok(Arc::new(BitLinear { weights, rounding, input_norm: None }))
    }

    fn weight_bytes(&self) -> Option<usize> {
        Some(self.bytes.load(Ordering::Relaxed))
    }
}
