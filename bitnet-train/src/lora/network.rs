//! A checkpoint with a trainable adapter beside it.

use std::sync::Arc;

use bitnet_model::{
    adapter::{Adapter, AdapterConfig},
    checkpoint::Checkpoint,
    config::{Config, WeightForm},
    kernels::TileFormat,
    model::Model,
    nn::{BitLinears, DenseLinears, LinearFactory},
    ops::gemm::Precision,
    pretrained::Source,
};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{
    Base, Kept, LoraLinears, QatLoraLinears, WholeTensors, check_whole_modules, noise::Step,
};
use crate::{Error, Result, parameters::Parameters};

/// Where the pairs are added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Beside the projections: `base(x) + s·B(A x)`. The base may be packed.
    #[default]
    Adapter,
    /// To latent masters, before they are quantized: `q(W + s·B·A)`, which is the function of the merged model.
    Qat,
}

/// How an adapter is trained.
#[derive(Clone, Copy, Debug)]
pub struct Training {
    /// Where its pairs are added.
    pub mode: Mode,
    /// Of its first values, and of dropout and noise.
    pub seed: u64,
    /// Of the products of the backward pass.
    pub backward: Precision,
    /// Room for products of the forward pass, for blocks that are computed again; with [`Mode::Qat`] none are kept.
    pub keep_bytes: usize,
}

/// The model that is trained and the one that evaluates it, which share the base and the adapter's variables.
pub struct LoraModel {
    /// Records gradients of the adapter.
    pub trained: Model,
    /// Records none.
    pub frozen: Model,
    /// The adapter's variables, by their names in the model: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub parameters: Arc<Parameters>,
    /// What dropout and noise follow.
    pub step: Step,
}

impl LoraModel {
    /// Loads `source` to `device`, with pairs as `config` says.
    ///
    /// # Errors
    /// Target modules or modules to save that the model does not have; a base that cannot be trained on in this mode.
    pub fn load(
        source: &Source,
        config: &AdapterConfig,
        training: Training,
        device: &Device,
    ) -> Result<Self> {
        let (model, Training { mode, seed, backward, keep_bytes }) = (&source.config, training);
        check_whole_modules(config, model)?;
        check_ranks(config, model)?;
        let (parameters, step) =
            (Parameters::on(device, seed), Step::new(seed, Kept::new(keep_bytes)));
        let checkpoint = source.checkpoint.var_builder(source.embedding_dtype(), device);
        let tensors = WholeTensors::new(checkpoint, config.clone(), parameters.clone());
        let load = |linears: &dyn LinearFactory, tracked| -> Result<Model> {
            let vocabulary = tensors.vocabulary(model, tracked)?;
            let vb = tensors.var_builder(tracked);
            Ok(Model::with_vocabulary(model, linears, vocabulary, vb)?)
        };
        let (trained, frozen) = match mode {
            Mode::Adapter => {
                // Two bits are decoded faster than five codes a byte.
                let packed = model.quantization.map(|quantization| {
                    let linears = BitLinears::new(quantization).with_format(TileFormat::TwoBit);
                    linears.with_backward(backward).reading(source.checkpoint.clone())
                });
                let base = match &packed {
                    Some(packed) => Base::Packed(packed),
                    None => Base::Other(&DenseLinears),
                };
                let linears = LoraLinears::new(
                    base,
                    config.clone(),
                    parameters.clone(),
                    step.clone(),
                    backward,
                );
                (load(&linears.trained(), true)?, load(&linears.frozen(), false)?)
            }
            Mode::Qat => {
                let rounding = latent_rounding(model)?;
                let (config, parameters) = (config.clone(), parameters.clone());
                let linears = QatLoraLinears::new(config, parameters, rounding, backward);
                (load(&linears.trained(), true)?, load(&linears.frozen(), false)?)
            }
        };
        if parameters.count() == 0 {
            let reason = "names no projection of the model: there is nothing to train";
            return Err(Error::recipe("lora.target_modules", reason));
        }
        Ok(Self { trained, frozen, parameters, step })
    }
}

/// A pair of a higher rank than its projection has no use for it.
fn check_ranks(config: &AdapterConfig, model: &Config) -> Result<()> {
    for (name, (out_features, in_features)) in model.projections() {
        let path = name.trim_end_matches(".weight");
        let refuse = |reason| Error::recipe("lora.rank", reason);
        let most = out_features.min(in_features);
        match config.pair(path).map_err(refuse)? {
            Some(pair) if pair.rank > most => {
                let rank = pair.rank;
                return Err(refuse(format!(
                    "{rank} is more than {most}, the rank of {path} itself"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The rounding of a model with latent masters of b1.58.
fn latent_rounding(config: &Config) -> Result<bitnet_model::quant::Rounding> {
    let refuse = |reason| Err(Error::recipe("lora.mode", reason));
    match config.quantization {
        Some(quantization) if quantization.weights != WeightForm::Latent => refuse(
            "is `qat`, but the model of [init] holds packed codes and no masters; take its latent checkpoint, or \
             leave lora.mode out",
        ),
        Some(quantization)
            if quantization.input_norm_eps.is_some()
                || quantization.scheme != Default::default() =>
        {
            refuse(
                "is `qat`, which is there for ternary weights and int8 inputs without norms of their own",
            )
        }
        Some(quantization) => Ok(quantization.rounding),
        None => refuse("is `qat`, but the model of [init] is not quantized"),
    }
}

/// The adapter whose variables are in `checkpoint`, a file of a run's weights.
///
/// # Errors
/// Tensors that cannot be read.
pub(crate) fn adapter(config: &AdapterConfig, checkpoint: &Checkpoint) -> Result<Adapter> {
    let read = |name: &str| Ok((name.to_owned(), checkpoint.read(name)?));
    let tensors = checkpoint.names().map(read).collect::<Result<Vec<_>>>()?;
    Ok(Adapter::from_tensors(config.clone(), tensors)?)
}
