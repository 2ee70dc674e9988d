//! Training that goes on from a checkpoint: full precision → 1.58 bit, or masters of a BitNet.
//!
//! The weights become the first masters. Families keep their architecture: a Llama stays one (SiLU, no norms before
//! `o_proj` and `down_proj`), unless `sub_norms` inserts these; it is then described as a BitNet whose gate is SiLU, which
//! transformers' `BitNetForCausalLM` and this project load alike. A model of 1bitLLM gets BitNet's tensor names.
//!
//! An inserted norm starts with gain 1, so `o_proj` and `down_proj` see rows of root-mean-square 1 whatever came before:
//! the function changes until the gains have been learnt. Where the input of a projection is to be rotated, its weight is
//! rotated once here, which leaves the function as it was.

use std::sync::Arc;

use bitnet_model::{
    checkpoint::Checkpoint,
    config::{Config, Family, Quantization, WeightForm},
    hub::{Hub, ModelFiles},
    pretrained::{Origin, Precision, Source},
    quant::{InputKind, Rounding, Scheme, hadamard},
};
use candle_core::DType;

use crate::{Error, Result, parameters::Parameters, recipe};

/// A checkpoint that a run starts from, and the configuration of what it becomes.
pub struct Start {
    checkpoint: Arc<Checkpoint>,
    source: Config,
    config: Config,
    files: Option<ModelFiles>,
}

impl Start {
    /// Opens `init.model`. `scheme` are the quantizers of the run; `None` goes on in full precision.
    ///
    /// # Errors
    /// A model that cannot be found or whose files contradict each other; packed codes, which have no masters; what no
    /// quantized model has, such as biases.
    pub fn open(init: &recipe::Init, scheme: Option<Scheme>) -> Result<Self> {
        let source = Source::open(&init.model, Precision::AsFound, &Hub::from_env())?;
        let config = target(&source.config, init.sub_norms, scheme)?;
        let files = match source.origin {
            Origin::Files(files) => Some(*files),
            Origin::Embedded | Origin::Synthetic | Origin::Gguf(_) => None,
        };
        Ok(Self { checkpoint: source.checkpoint, source: source.config, config, files })
    }

    /// The model that is trained.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The checkpoint's files, if it lies on disk: tokenizer and settings come with it.
    pub fn files(&self) -> Option<&ModelFiles> {
        self.files.as_ref()
    }

    /// Sets the variables of a model loaded with [`config`](Self::config) to the checkpoint's weights, as f32.
    ///
    /// # Errors
    /// A tensor that cannot be read; a variable that is neither in the checkpoint nor an inserted norm.
    pub fn load(&self, parameters: &Parameters) -> Result<()> {
        for (name, var) in parameters.named() {
            let stored = self.stored_name(&name);
            if self.checkpoint.get(&stored).is_none() {
                if self.source.sub_norm_names().is_none() && is_sub_norm(&self.config, &name) {
                    continue; // starts with gain 1
                }
                let reason = "is not in the checkpoint".into();
                return Err(Error::Tensor { path: self.checkpoint.path().into(), name, reason });
            }
            let mut value = self.checkpoint.read(&stored)?.to_dtype(DType::F32)?;
            if self.is_rotated(&name) {
                value = hadamard(&value)?;
            }
            var.set(&value.contiguous()?.to_device(var.device())?)?;
        }
        Ok(())
    }

    /// The name in the checkpoint of the variable `name`.
    fn stored_name(&self, name: &str) -> String {
        let pairs = self.config.sub_norm_names().zip(self.source.sub_norm_names());
        let Some(((attn, ffn), (old_attn, old_ffn))) = pairs else { return name.into() };
        name.replace(&format!(".{attn}."), &format!(".{old_attn}."))
            .replace(&format!(".{ffn}."), &format!(".{old_ffn}."))
    }

    /// Whether the weight `name` meets rotated inputs where it met plain ones, or the other way round: the transform is
    /// its own inverse.
    fn is_rotated(&self, name: &str) -> bool {
        let input = |config: &Config| {
            let scheme = config.quantization.map(|q| q.scheme);
            let is = |input: InputKind| input.hadamard;
            scheme.is_some_and(|scheme| match name {
                _ if name.ends_with(".o_proj.weight") => is(scheme.o_proj),
                _ if name.ends_with(".down_proj.weight") => is(scheme.down_proj),
                _ => false,
            })
        };
        input(&self.config) != input(&self.source)
    }
}

fn is_sub_norm(config: &Config, name: &str) -> bool {
    config.sub_norm_names().is_some_and(|(attn, ffn)| {
        [attn, ffn].iter().any(|norm| name.ends_with(&format!(".{norm}.weight")))
    })
}

/// The configuration of what is trained from a checkpoint of `source`.
fn target(source: &Config, sub_norms: bool, scheme: Option<Scheme>) -> Result<Config> {
    let refuse = |key, reason: &str| Err(Error::recipe(key, reason));
    if let Some(Quantization { weights, input_norm_eps, .. }) = source.quantization {
        if weights != WeightForm::Latent {
            return refuse(
                "init.model",
                "holds packed codes and no masters to train; `bitnet convert IN OUT --to latent` makes some, or take \
                 the latent checkpoint",
            );
        }
        if input_norm_eps.is_some() {
            return refuse("init.model", "has a norm in every projection, which cannot be trained");
        }
        if scheme.is_none() {
            return refuse(
                "model.precision",
                "is full, but `init.model` holds masters of a quantized model",
            );
        }
    }
    if sub_norms && source.sub_norm_names().is_some() {
        return refuse("init.sub_norms", "is true, but the model has its sub-norms already");
    }
    if sub_norms && source.num_attention_heads * source.head_dim != source.hidden_size {
        return refuse(
            "init.sub_norms",
            "needs attention heads that make up `hidden_size` together, as BitNet's have",
        );
    }
    if scheme.is_some() && source.attention_bias {
        return refuse("init.model", "has biases in its projections, which no quantized model has");
    }
    let family = match source.family {
        Family::OneBitLlm => Family::BitNet,
        Family::Llama if sub_norms => Family::BitNet,
        family => family,
    };
    let quantization = scheme.map(|scheme| Quantization {
        weights: WeightForm::Latent,
        rounding: Rounding::HalfEven,
        scheme,
        input_norm_eps: None,
    });
    Ok(Config { family, quantization, ..source.clone() })
}
