//! Quantization-aware training as a linear factory: latent f32 weights, quantized in every forward
//! pass by the very code that packs them for inference, trained straight through.

use std::sync::Arc;

use bitnet_model::{
    activations::SharedActivations,
    nn::{LinearFactory, LinearSpec, Projection, Projections},
    ops::{dense_matmul, gemm::Precision},
    quant::{ActivationQuantizer, Quantizer, Rounding, Scheme, WeightQuantizer},
};
use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

use crate::{
    qat_matmul::{QatProduct, qat_matmul},
    warmup::Lambda,
};

/// A BitLinear whose weight is a trainable master.
#[derive(Clone, Debug)]
pub struct QatLinear {
    latent: Tensor,
    quantizers: Quantizers,
    lambda: Lambda,
    backward: Precision,
}

/// What a projection quantizes; what is `None` stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantizers {
    /// Its weight.
    pub weight: Option<WeightQuantizer>,
    /// Its input.
    pub input: Option<ActivationQuantizer>,
}

impl From<Rounding> for Quantizers {
    /// Those of b1.58.
    fn from(rounding: Rounding) -> Self {
        Self { weight: Some(rounding.into()), input: Some(rounding.into()) }
    }
}

impl QatLinear {
    /// `latent` (out_features, in_features) f32; a [`Rounding`] stands for the quantizers of b1.58.
    pub fn new(latent: Tensor, quantizers: impl Into<Quantizers>) -> Self {
        let (lambda, backward) = (Lambda::default(), Precision::F32);
        Self { latent, quantizers: quantizers.into(), lambda, backward }
    }

    /// The same projection with a λ that others may share.
    pub fn with_lambda(self, lambda: Lambda) -> Self {
        Self { lambda, ..self }
    }

    /// The same projection with products of the backward pass in this precision.
    pub fn with_backward(self, backward: Precision) -> Self {
        Self { backward, ..self }
    }

    /// The input in the coordinates in which it is quantized.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        match self.quantizers.input {
            Some(input) => input.rotate(x),
            None => Ok(x.clone()),
        }
    }

    /// `x` (…, in_features), rotated, → (…, out_features). Its integers are `shared` with other projections.
    fn product(&self, x: &Tensor, shared: &SharedActivations) -> Result<Tensor> {
        let (Quantizers { weight, input }, lambda) = (self.quantizers, self.lambda.get());
        if let (Some(weight), Some(input)) = (weight, input)
            && lambda == 1.
        {
            let product = QatProduct { weight, input: input.codes, backward: self.backward };
            return qat_matmul(x, &self.latent, product, shared);
        }
        let x = match input {
            Some(input) => &input.codes.blend(x, lambda)?,
            None => x,
        };
        match weight {
            Some(weight) => dense_matmul(x, &weight.blend(&self.latent, lambda)?),
            None => dense_matmul(x, &self.latent),
        }
    }
}

impl Module for QatLinear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.product(&self.rotate(x)?, &SharedActivations::default())
    }
}

/// Projections that quantize the same input in the same way.
struct QatProjections(Vec<QatLinear>);

impl Projections for QatProjections {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let Some(first) = self.0.first() else { return Ok(Vec::new()) };
        let (x, shared) = (first.rotate(x)?, SharedActivations::default());
        self.0.iter().map(|projection| projection.product(&x, &shared)).collect()
    }
}

/// The factory of quantization-aware training.
#[derive(Clone, Debug)]
pub struct QatLinears {
    rounding: Rounding,
    scheme: Scheme,
    lambda: Lambda,
    backward: Precision,
}

impl QatLinears {
    /// Projections of b1.58, that round weights and activations like this.
    pub fn new(rounding: Rounding) -> Self {
        let (scheme, lambda, backward) = Default::default();
        Self { rounding, scheme, lambda, backward }
    }

    /// With other quantizers.
    pub fn with_scheme(self, scheme: Scheme) -> Self {
        Self { scheme, ..self }
    }

    /// With a λ that the projections share.
    pub fn with_lambda(self, lambda: Lambda) -> Self {
        Self { lambda, ..self }
    }

    /// With products of the backward pass in this precision.
    pub fn with_backward(self, backward: Precision) -> Self {
        Self { backward, ..self }
    }

    fn load(&self, spec: LinearSpec, vb: VarBuilder) -> Result<QatLinear> {
        if spec.bias {
            bail!("{}: quantized projections have no bias", vb.prefix())
        }
        let shape = (spec.out_features, spec.in_features);
        let init = Init::Randn { mean: 0., stdev: 0.02 };
        let latent = vb.get_with_hints_dtype(shape, "weight", init, DType::F32)?;
        let quantizers = Quantizers {
            weight: self.scheme.weight(self.rounding),
            input: self.scheme.input(spec.name).quantizer(self.rounding),
        };
        let linear = QatLinear::new(latent, quantizers).with_lambda(self.lambda.clone());
        Ok(linear.with_backward(self.backward))
    }
}

impl LinearFactory for QatLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(Arc::new(self.load(spec, vb)?))
    }

    /// The input is quantized once, if all projections do it alike.
    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let each = specs.iter().map(|&spec| self.load(spec, vb.pp(spec.name)));
        let each: Vec<QatLinear> = each.collect::<Result<_>>()?;
        let alike =
            each.windows(2).all(|pair| pair[0].quantizers.input == pair[1].quantizers.input);
        Ok(match alike {
            true => Arc::new(QatProjections(each)),
            false => Arc::new(Vec::from_iter(
                each.into_iter().map(|linear| -> Projection { Arc::new(linear) }),
            )),
        })
    }
}
