//! [`Adapter`] → one GGUF file.

use std::path::Path;

use super::Adapter;
use crate::{
    Error, Result,
    checkpoint::gguf::{LoraContents, LoraPair, write_lora},
    config::Config,
};

impl Adapter {
    /// Writes the adapter as llama.cpp's `--lora` takes it, for a model of `config`; `name` is what the file says of itself.
    /// Every pair has the scale it has here, be it by its own rank or alpha, or by rsLoRA. Dropout has no place there.
    ///
    /// # Errors
    /// An adapter for another model, one with whole modules, which llama.cpp has no place for, and a disk that is full.
    pub fn write_gguf(&self, config: &Config, name: &str, path: &Path) -> Result<()> {
        self.check(config)?;
        if let Some(module) = self.modules.keys().next() {
            return Err(Error::Config {
                path: self.origin.join(super::CONFIG),
                field: "modules_to_save".into(),
                reason: format!(
                    "`{module}` is stored whole, and an adapter in a GGUF file has pairs only: train without \
                     modules_to_save, or merge the adapter with `bitnet merge`"
                ),
            });
        }
        let mut pairs = Vec::with_capacity(self.pairs.len());
        for (path, pair) in &self.pairs {
            let Some(spec) = self.spec(path)? else { return Err(self.not_a_target(path)) };
            pairs.push(LoraPair {
                path,
                lora_a: &pair.lora_a,
                lora_b: &pair.lora_b,
                scale: spec.scale,
            });
        }
        let base = self.config.base_model.as_deref();
        write_lora(LoraContents { name, base, config, pairs: &pairs }, path)
    }
}
