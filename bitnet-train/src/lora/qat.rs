//! LoRA inside the quantizer: a projection multiplies by `q(W + s·B·A)`, where `W` is a frozen master.
//!
//! What is trained is the very function of the merged model, which an adapter beside ternary weights is not: adding
//! `s·B·A` to the master and packing the sum gives the codes of the last step.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use bitnet_model::{
    activations::SharedActivations,
    adapter::AdapterConfig,
    nn::{LinearFactory, LinearSpec, LowRank, Projection, Projections},
    ops::gemm::Precision,
    quant::{ActivationCodes, Rounding, WeightQuantizer},
};
use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::VarBuilder;

use super::linears::trained_pair;
use crate::{
    parameters::Parameters,
    qat_matmul::{QatProduct, qat_matmul},
};

/// Makes projections of quantized sums, for the model that is trained and the one that evaluates it. They share the
/// masters.
pub struct QatLoraLinears {
    config: AdapterConfig,
    parameters: Arc<Parameters>,
    rounding: Rounding,
    backward: Precision,
    masters: Mutex<BTreeMap<String, Tensor>>,
}

impl QatLoraLinears {
    /// Pairs as `config` says (its dropout does not apply: what is trained is a weight), made among `parameters`; masters
    /// of b1.58.
    pub fn new(
        config: AdapterConfig,
        parameters: Arc<Parameters>,
        rounding: Rounding,
        backward: Precision,
    ) -> Self {
        Self { config, parameters, rounding, backward, masters: Mutex::default() }
    }

    /// The factory of the model that is trained.
    pub fn trained(&self) -> QatLoraView<'_> {
        QatLoraView { linears: self, tracked: true }
    }

    /// The factory of the model that records no gradients.
    pub fn frozen(&self) -> QatLoraView<'_> {
        QatLoraView { linears: self, tracked: false }
    }

    /// The master at `vb`, f32, read once.
    fn master(&self, spec: LinearSpec, vb: &VarBuilder) -> Result<Tensor> {
        let mut masters = self.masters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(master) = masters.get(&vb.prefix()) {
            return Ok(master.clone());
        }
        let shape = (spec.out_features, spec.in_features);
        let master = vb.get_with_hints_dtype(shape, "weight", Default::default(), DType::F32)?;
        masters.insert(vb.prefix(), master.clone());
        Ok(master)
    }
}

/// Either factory of a [`QatLoraLinears`].
#[derive(Clone, Copy)]
pub struct QatLoraView<'a> {
    linears: &'a QatLoraLinears,
    tracked: bool,
}

impl QatLoraView<'_> {
    fn load(&self, spec: LinearSpec, vb: &VarBuilder) -> Result<QatLora> {
        if spec.bias {
            bail!("{}: quantized projections have no bias", vb.prefix())
        }
        let QatLoraLinears { config, parameters, rounding, backward, .. } = self.linears;
        let pair = trained_pair(config, parameters, (spec, &vb.prefix()), self.tracked)?;
        let pair = pair.map(|pair| LowRank::new(pair.lora_a, pair.lora_b, pair.scale));
        let product = QatProduct {
            weight: WeightQuantizer::from(*rounding),
            input: ActivationCodes::from(*rounding),
            backward: *backward,
        };
        Ok(QatLora { master: self.linears.master(spec, vb)?, pair: pair.transpose()?, product })
    }
}

impl LinearFactory for QatLoraView<'_> {
    fn linear(&self, spec: LinearSpec, vb: VarBuilder) -> Result<Projection> {
        Ok(Arc::new(self.load(spec, &vb)?))
    }

    fn linears(&self, specs: &[LinearSpec], vb: &VarBuilder) -> Result<Arc<dyn Projections>> {
        let each = specs.iter().map(|&spec| self.load(spec, &vb.pp(spec.name)));
        Ok(Arc::new(QatLoraProjections(each.collect::<Result<_>>()?)))
    }
}

/// A projection of a quantized sum.
struct QatLora {
    master: Tensor,
    pair: Option<LowRank>,
    product: QatProduct,
}

impl QatLora {
    fn product(&self, x: &Tensor, input: &SharedActivations) -> Result<Tensor> {
        let latent = match &self.pair {
            // As a merge computes it, bit for bit.
            Some(pair) => (&self.master + pair.weight_delta()?)?,
            None => self.master.clone(),
        };
        qat_matmul(x, &latent, self.product, input)
    }
}

impl Module for QatLora {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.product(x, &SharedActivations::default())
    }
}

/// Projections that share the integers of their input.
struct QatLoraProjections(Vec<QatLora>);

impl Projections for QatLoraProjections {
    fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let input = SharedActivations::default();
        self.0.iter().map(|linear| linear.product(x, &input)).collect()
    }
}
