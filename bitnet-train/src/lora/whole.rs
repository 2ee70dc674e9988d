//! `modules_to_save`: embedding, head and norms that are trained whole, beside the pairs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use bitnet_model::{
    adapter::{AdapterConfig, whole_tensors},
    config::Config,
    nn::Vocabulary,
};
use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};

use crate::{Error, parameters::Parameters};

const EMBED_TOKENS: &str = "model.embed_tokens";
const LM_HEAD: &str = "lm_head";

/// Checks that `config` names nothing but what can be trained whole in a model of `model`.
///
/// # Errors
/// The first name that cannot, with those that can.
pub fn check(config: &AdapterConfig, model: &Config) -> crate::Result<()> {
    let tensors = whole_tensors(model);
    let modules = || tensors.keys().filter_map(|name| name.strip_suffix(".weight"));
    for name in &config.modules_to_save {
        if !modules().any(|path| path.ends_with(name)) {
            let mut names: Vec<&str> =
                modules().filter_map(|path| path.rsplit('.').next()).collect();
            names.sort_unstable();
            names.dedup();
            let reason = format!(
                "`{name}` cannot be trained whole: ternary projections get adapters \
                 (`lora.target_modules`); choose from {}",
                names.join(", ")
            );
            return Err(Error::recipe("lora.modules_to_save", reason));
        }
    }
    Ok(())
}

/// The tensors of a checkpoint, of which some are variables. Each is read once, however often it is asked for.
#[derive(Clone)]
pub struct WholeTensors(Arc<Tensors>);

struct Tensors {
    checkpoint: VarBuilder<'static>,
    config: AdapterConfig,
    parameters: Arc<Parameters>,
    read: Mutex<BTreeMap<(String, &'static str), Tensor>>,
}

impl WholeTensors {
    /// Those of `checkpoint`; the ones that `config` trains whole start from there, among `parameters`.
    pub fn new(
        checkpoint: VarBuilder<'static>,
        config: AdapterConfig,
        parameters: Arc<Parameters>,
    ) -> Self {
        Self(Arc::new(Tensors { checkpoint, config, parameters, read: Mutex::default() }))
    }

    /// A builder of these tensors; variables are `tracked` or not.
    pub fn var_builder(&self, tracked: bool) -> VarBuilder<'static> {
        let (dtype, device) = (self.0.checkpoint.dtype(), self.0.checkpoint.device().clone());
        let backend = Backend { tensors: self.0.clone(), tracked };
        VarBuilder::from_backend(Box::new(backend), dtype, device)
    }

    /// Embedding and head of a model of `model`. If they are tied, one that is trained whole parts from the other, as in
    /// PEFT.
    ///
    /// # Errors
    /// Tensors that are absent or of another shape.
    pub fn vocabulary(&self, model: &Config, tracked: bool) -> Result<Vocabulary> {
        let shape = Shape::from((model.vocab_size, model.hidden_size));
        let (dtype, weight) = (self.0.checkpoint.dtype(), |module| format!("{module}.weight"));
        let embed_tokens = self.0.get(&shape, &weight(EMBED_TOKENS), dtype, tracked)?;
        let lm_head = match (model.tie_word_embeddings, self.0.config.saves(LM_HEAD)) {
            (false, _) => self.0.get(&shape, &weight(LM_HEAD), dtype, tracked)?,
            (true, false) => self.0.read(&shape, &weight(EMBED_TOKENS), dtype)?,
            (true, true) => {
                let tied = || self.0.read(&shape, &weight(EMBED_TOKENS), dtype);
                let var = self.0.parameters.get_or_insert(&weight(LM_HEAD), tied)?;
                if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() }
            }
        };
        Ok(Vocabulary::from_tensors(embed_tokens, lm_head))
    }
}

impl Tensors {
    fn get(&self, shape: &Shape, name: &str, dtype: DType, tracked: bool) -> Result<Tensor> {
        if !name.strip_suffix(".weight").is_some_and(|path| self.config.saves(path)) {
            return self.read(shape, name, dtype);
        }
        let var = self.parameters.get_or_insert(name, || self.load(shape, name, DType::F32))?;
        Ok(if tracked { var.as_tensor().clone() } else { var.as_detached_tensor() })
    }

    fn read(&self, shape: &Shape, name: &str, dtype: DType) -> Result<Tensor> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_owned(), dtype.as_str());
        if let Some(tensor) = read.get(&key) {
            return Ok(tensor.clone());
        }
        let tensor = self.load(shape, name, dtype)?;
        read.insert(key, tensor.clone());
        Ok(tensor)
    }

    fn load(&self, shape: &Shape, name: &str, dtype: DType) -> Result<Tensor> {
        self.checkpoint.get_with_hints_dtype(shape, name, Default::default(), dtype)
    }
}

struct Backend {
    tensors: Arc<Tensors>,
    tracked: bool,
}

impl SimpleBackend for Backend {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, _: &Device) -> Result<Tensor> {
        // Projections are kept by their factories.
        let is_kept = s.rank() == 1 && dtype == DType::F32;
        match is_kept {
            true => self.tensors.get(&s, name, dtype, self.tracked),
            false => self.tensors.load(&s, name, dtype),
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        self.tensors.checkpoint.get_unchecked_dtype(name, dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.checkpoint.contains_tensor(name)
    }
}
