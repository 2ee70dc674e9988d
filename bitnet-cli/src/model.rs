//! Which model, and how to sample from it: the options that several commands share.

use bitnet_model::{
    hub::Hub,
    pretrained::{DEFAULT, Precision, Source},
};
use clap::Args;

use crate::args::Global;

/// Options that name a model.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Hub repo id (org/name), folder, .safetensors file, or `default` for the model inside this program
    #[arg(long, short, value_name = "MODEL", default_value = DEFAULT)]
    pub model: String,
    /// Branch, tag or commit of a Hub repo
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Take float weights without a quantization_config for masters of a 1.58-bit model (Falcon-E prequantized)
    #[arg(long, conflicts_with = "full_precision")]
    pub ternarize: bool,
    /// Run float weights without a quantization_config as they are, in full precision
    #[arg(long)]
    pub full_precision: bool,
}

impl ModelArgs {
    /// Finds the model and checks everything but the weights' values.
    pub fn open(&self, global: &Global) -> anyhow::Result<Source> {
        let precision = match (self.ternarize, self.full_precision) {
            (true, _) => Precision::Ternarize,
            (_, true) => Precision::Full,
            _ => Precision::AsConfigured,
        };
        Ok(Source::open(&self.model, precision, &self.hub(global))?)
    }

    /// The Hub as the environment and the options have it.
    pub fn hub(&self, global: &Global) -> Hub {
        let hub = Hub::from_env();
        let hub = if global.quiet { hub.progress(false) } else { hub };
        match &self.revision {
            Some(revision) => hub.revision(revision),
            None => hub,
        }
    }
}
