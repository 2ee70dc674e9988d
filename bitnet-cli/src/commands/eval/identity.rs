//! Which model answers, so that the results of two are never mixed.

use std::{fs::File, io, path::Path};

use anyhow::Context;
use bitnet_model::{
    fingerprint::hex, nn::HeadPrecision, ops::KvType, pretrained::Source, text::Tokenizer,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Args;
use crate::args::Global;

/// The model, and how it runs.
pub struct Identity {
    model: String,
    adapters: Vec<String>,
    lm_head: &'static str,
    kv_cache: &'static str,
    /// Each task's own if it is `None`.
    max_new_tokens: Option<usize>,
    /// Seconds of a program.
    code_timeout: u64,
    fingerprint: Option<String>,
}

impl Identity {
    /// Reads the weights for their fingerprint if results are to be kept.
    pub fn new(
        (source, tokenizer): (&Source, &Tokenizer),
        args: &Args,
        kv_type: KvType,
        global: &Global,
    ) -> anyhow::Result<Self> {
        let adapters = Vec::from_iter(args.adapters.adapters.iter().map(ToString::to_string));
        let mut hash = Sha256::new();
        if args.output.is_some() {
            add_model(&mut hash, source, tokenizer)?;
            for adapter in &args.adapters.adapters {
                let folder = args.model.hub(global).resolve_adapter(&adapter.source)?;
                hash.update(adapter.scale.to_le_bytes());
                for file in ["adapter_config.json", "adapter_model.safetensors"] {
                    add_file(&mut hash, &folder.join(file))?;
                }
            }
            hash.update([u8::from(args.model.ternarize), u8::from(args.model.full_precision)]);
        }
        let fingerprint = || hex(&hash.finalize()[..8]);
        Ok(Self {
            model: source.name.clone(),
            adapters,
            lm_head: HeadPrecision::from(args.model.lm_head()).name(),
            kv_cache: kv_type.name(),
            max_new_tokens: args.max_new_tokens(),
            code_timeout: args.code_timeout,
            fingerprint: args.output.is_some().then(fingerprint),
        })
    }

    /// The first line of a file of results.
    pub fn header(&self) -> Value {
        json!({
            "bitnet_eval": 1, "model": self.model, "adapters": self.adapters, "lm_head": self.lm_head,
            "kv_cache": self.kv_cache, "max_new_tokens": self.max_new_tokens,
            "code_timeout": self.code_timeout, "fingerprint": self.fingerprint,
        })
    }

    /// All that was said, for `--json`.
    pub fn config(&self, args: &Args) -> Value {
        let mut config = self.header();
        config["limit"] = json!(args.limit);
        config["seed"] = json!(args.seed);
        config["bootstrap"] = json!(args.bootstrap());
        config["apply_chat_template"] = json!(args.apply_chat_template);
        config
    }
}

/// Wherever the model lies: its tensors and tokens by name, and what else makes its answers.
fn add_model(hash: &mut Sha256, source: &Source, tokenizer: &Tokenizer) -> anyhow::Result<()> {
    for name in source.checkpoint.names() {
        hash.update(name);
        hash.update(source.checkpoint.read_bytes(name)?);
    }
    for id in 0..tokenizer.vocab_size() as u32 {
        hash.update(tokenizer.id_to_token(id).unwrap_or_default());
        hash.update([0]);
    }
    hash.update(format!("{:?} {:?}", source.config, source.generation.eos_token_ids));
    Ok(())
}

fn add_file(hash: &mut Sha256, path: &Path) -> anyhow::Result<()> {
    let mut copy = || io::copy(&mut File::open(path)?, hash);
    copy().with_context(|| path.display().to_string())?;
    Ok(())
}
