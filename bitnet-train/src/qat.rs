//! Quantization-aware training as a linear factory: latent f32 weights, quantized in every forward
//! pass by the very code that packs them for inference, trained straight through.

use std::sync::Arc;

use bitnet_model::{
    nn::{LinearFactory, LinearSpec, Projection},
    ops::dense_matmul,
    quant::{ActivationQuantizer, Quantizer, Rounding, Scheme, WeightQuantizer},
};
use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};

use crate::{qat_matmul::qat_matmul, warmup::Lambda};

/// A BitLinear whose weight is a trainable master.
#[derive(Clone, Debug)]
pub struct QatLinear {
    latent: Tensor,
    quantizers: Quantizers,
    lambda: Lambda,
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
        Self { latent, quantizers: quantizers.into(), lambda: Lambda::default() }
    }

    /// The same projection with a λ that others may share.
    pub fn with_lambda(self, lambda: Lambda) -> Self {
        Self { lambda, ..self }
    }

    /// `x` (tokens, in_features) → (tokens, out_features).
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (Quantizers { weight, input }, lambda) = (self.quantizers, self.lambda.get());
        let x = match input {
            Some(input) => &input.rotate(x)?,
            None => x,
        };
        if let (Some(weight), Some(input)) = (weight, input)
            && lambda == 1.
        {
            return qat_matmul(x, &self.latent, weight, input.codes);
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
        let (out_features, in_features) = self.latent.dims2()?;
        let mut shape = x.dims().to_vec();
        match shape.last_mut() {
            Some(last) if *last == in_features => *last = out_features,
            _ => bail!("qat-linear: x {:?} does not fit {:?}", x.shape(), self.latent.shape()),
        }
        self.product(&x.reshape(((), in_features))?)?.reshape(shape)
    }
}

/// The factory of quantization-aware training.
#[derive(Clone, Debug)]
pub struct QatLinears {
    rounding: Rounding,
    scheme: Scheme,
    lambda: Lambda,
}

impl QatLinears {
    /// Projections of b1.58, that round weights and activations like this.
    pub fn new(rounding: Rounding) -> Self {
        Self { rounding, scheme: Scheme::default(), lambda: Lambda::default() }
    }

    /// With other quantizers.
    pub fn with_scheme(self, scheme: Scheme) -> Self {
        Self { scheme, ..self }
    }

    /// With a λ that the projections share.
    pub fn with_lambda(self, lambda: Lambda) -> Self {
        Self { lambda, ..self }
    }
}

impl LinearFactory for QatLinears {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
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
        Ok(Arc::new(QatLinear::new(latent, quantizers).with_lambda(self.lambda.clone())))
    }
}
