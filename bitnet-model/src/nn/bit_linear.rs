//! `BitLinear`: a projection with ternary weights and int8 activations (arXiv:2402.17764), or what else of few bits the
//! same integers can express.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::{LinearFactory, LinearSpec, Projection, Projections, RmsNorm};
use crate::{
    activations::SharedActivations,
    config::{Quantization, ScaleConvention, WeightForm},
    kernels::TileFormat,
    ops::{
        TernaryProduct, dense_matmul, gemm::Precision, normed_ternary_matmul, ternary_matmul,
        ternary_matmul_part,
    },
    packed::{PackedError, PackedSource},
    pages::Arena,
    quant::{ActivationQuantizer, Quantizer},
    storage::with_slice,
    weights::TernaryWeight,
};

/// `y = (int8(x)·codesᵀ) · scale`, after the projection's own norm if it has one. Of several matrices with the same input
/// the results lie side by side.
#[derive(Clone, Debug)]
pub struct BitLinear {
    weights: Arc<[TernaryWeight]>,
    input: ActivationQuantizer,
    input_norm: Option<RmsNorm>,
    backward: Precision,
}

impl BitLinear {
    /// A projection that takes its input as `input` says; a [`Rounding`](crate::quant::Rounding) stands for int8.
    pub fn new(
        weight: TernaryWeight,
        input: impl Into<ActivationQuantizer>,
        input_norm: Option<RmsNorm>,
    ) -> Self {
        let (input, backward) = (input.into(), Precision::F32);
        Self { weights: Arc::new([weight]), input, input_norm, backward }
    }

    /// The packed weights.
    pub fn weights(&self) -> &Arc<[TernaryWeight]> {
        &self.weights
    }

    /// Whether the input is quantized as it comes, neither normalized nor rotated before.
    pub fn takes_input_as_it_is(&self) -> bool {
        self.input_norm.is_none() && !self.input.hadamard
    }

    /// The input as it is multiplied.
    fn input(&self, x: &Tensor) -> Result<Tensor> {
        match &self.input_norm {
            Some(norm) => self.input.rotate(&norm.forward(x)?),
            None => self.input.rotate(x),
        }
    }

    /// The results of the matrices, of which `y` has all.
    fn parts(&self, y: &Tensor) -> Result<Vec<Tensor>> {
        let mut first = 0;
        let parts = self.weights.iter().map(|weight| {
            let part = y.narrow(D::Minus1, first, weight.out_features());
            first += weight.out_features();
            part
        });
        parts.collect()
    }

    /// How it multiplies.
    pub fn product(&self) -> TernaryProduct {
        TernaryProduct { input: self.input.codes, backward: self.backward }
    }
}

impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ternary_matmul(&self.input(x)?, &self.weights, self.product())
    }
}

impl Projections for BitLinear {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        if x.track_op() {
            let (x, input) = (self.input(x)?, SharedActivations::default());
            let part =
                |index| ternary_matmul_part(&x, &self.weights, index, self.product(), &input);
            return (0..self.weights.len()).map(part).collect();
        }
        self.parts(&Module::forward(self, x)?)
    }

    /// One op, if no gradient is recorded.
    fn forward_normed(&self, x: &Tensor, norm: &RmsNorm) -> Result<Vec<Tensor>> {
        let (weight, eps) = norm.parameters();
        if x.track_op() || weight.track_op() || !self.takes_input_as_it_is() {
            return Projections::forward(self, &norm.forward(x)?);
        }
        let product = self.product();
        self.parts(&normed_ternary_matmul(x, (weight, eps), &self.weights, product)?)
    }
}

/// The factory of packed inference: every projection is a [`BitLinear`].
#[derive(Debug)]
pub struct BitLinears {
    quantization: Quantization,
    format: TileFormat,
    codes: Option<Arc<dyn PackedSource>>,
    backward: Precision,
    arena: Arena,
    /// Of the weights loaded so far.
    bytes: AtomicUsize,
}

impl BitLinears {
    /// Loads projections quantized like this, into memory of large pages.
    pub fn new(quantization: Quantization) -> Self {
        let (format, arena) = (TileFormat::default(), Arena::default());
        let (backward, bytes) = (Precision::F32, AtomicUsize::new(0));
        Self { quantization, format, codes: None, backward, arena, bytes }
    }

    /// With weights in memory in this format; results do not depend on it.
    pub fn with_format(self, format: TileFormat) -> Self {
        Self { format, ..self }
    }

    /// With products of the backward pass in this precision.
    pub fn with_backward(self, backward: Precision) -> Self {
        Self { backward, ..self }
    }

    /// The same factory, which reads packed codes piece by piece from `codes` and not as tensors.
    pub fn reading(self, codes: Arc<dyn PackedSource>) -> Self {
        Self { codes: Some(codes), ..self }
    }

    /// How the projections are quantized.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// How the projection `name` takes its input, if that and the weights are integers.
    fn integer_input(&self, name: &str) -> Option<ActivationQuantizer> {
        let Quantization { rounding, scheme, .. } = self.quantization;
        scheme.weight(rounding).and(scheme.input(name).quantizer(rounding))
    }

    /// The projection `spec` if weights or inputs are not quantized.
    fn load_partly_quantized(&self, spec: LinearSpec, vb: VarBuilder) -> Result<PartlyQuantized> {
        let Quantization { rounding, scheme, .. } = self.quantization;
        let shape = (spec.out_features, spec.in_features);
        let weight = match scheme.weight(rounding) {
            Some(_) => Tensor::from_vec(
                self.read_weight(spec, vb.clone())?.dequantize(),
                shape,
                vb.device(),
            )?,
            None => vb.get_with_hints_dtype(shape, "weight", Default::default(), DType::F32)?,
        };
        self.bytes.fetch_add(weight.elem_count() * size_of::<f32>(), Ordering::Relaxed);
        let input_norm = self.load_input_norm(spec, &vb)?;
        let input = scheme.input(spec.name).quantizer(rounding);
        Ok(PartlyQuantized { weight, input, input_norm })
    }

    fn load_input_norm(&self, spec: LinearSpec, vb: &VarBuilder) -> Result<Option<RmsNorm>> {
        let norm = |eps| RmsNorm::load(spec.in_features, eps, vb.pp("rms_norm"));
        self.quantization.input_norm_eps.map(norm).transpose()
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
        let Quantization { weights, rounding, scheme, .. } = self.quantization;
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
                let Some(quantizer) = scheme.weight(rounding) else {
                    return Err(refuse("stays unquantized: it has no codes".into()));
                };
                Ok(TernaryWeight::from_latent(latent, shape, quantizer, self.format))
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

    /// Projections of one input, each with the builder at its name, as one [`BitLinear`]; `None` if weights or inputs are not
    /// quantized, or if norms of their own keep several apart.
    ///
    /// # Errors
    /// As [`LinearFactory::linear`].
    pub fn stacked(&self, parts: &[(LinearSpec, VarBuilder)]) -> Result<Option<BitLinear>> {
        let Some((spec, vb)) = parts.first() else { return Ok(None) };
        let Some(input) = self.integer_input(spec.name) else { return Ok(None) };
        if parts.len() > 1 && self.quantization.input_norm_eps.is_some() {
            return Ok(None);
        }
        let input_norm = self.load_input_norm(*spec, vb)?;
        let weights = parts.iter().map(|(spec, vb)| self.load_weight(*spec, vb.clone()));
        let weights = weights.collect::<Result<Vec<_>>>()?.into();
        Ok(Some(BitLinear { weights, input, input_norm, backward: self.backward }))
    }
}

impl LinearFactory for BitLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(match self.stacked(&[(spec, vb.clone())])? {
            Some(linear) => Arc::new(linear),
            None => Arc::new(self.load_partly_quantized(spec, vb)?),
        })
    }

    /// One [`BitLinear`]: the input is quantized once and the matrices are one parallel region. Norms of their own, or
    /// inputs that stay as they are, keep projections apart.
    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let parts = Vec::from_iter(specs.iter().map(|&spec| (spec, vb.pp(spec.name))));
        if let Some(linear) = self.stacked(&parts)? {
            return Ok(Arc::new(linear));
        }
        let each = parts.into_iter().map(|(spec, vb)| self.linear(spec, vb));
        Ok(Arc::new(each.collect::<Result<Vec<Projection>>>()?))
    }

    fn weight_bytes(&self) -> Option<usize> {
        Some(self.bytes.load(Ordering::Relaxed))
    }
}

/// A projection of which only the weights or only the activations are quantized: the formula itself, in f32.
struct PartlyQuantized {
    weight: Tensor,
    input: Option<ActivationQuantizer>,
    input_norm: Option<RmsNorm>,
}

impl Module for PartlyQuantized {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.input_norm {
            Some(norm) => &norm.forward(x)?,
            None => x,
        };
        match self.input {
            Some(input) => dense_matmul(&input.codes.blend(&input.rotate(x)?, 1.)?, &self.weight),
            None => dense_matmul(x, &self.weight),
        }
    }
}
