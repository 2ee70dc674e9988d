//! A model ready to use: `Pretrained::open` takes what a user types and brings model, tokenizer and
//! settings together.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};

use crate::{
    Error, Result,
    calibration::fastest_format,
    checkpoint::{
        Checkpoint, Dtype, StoredRows,
        gguf::{Gguf, TextFiles, TokenizerFiles},
    },
    config::{Config, GenerationConfig},
    head_weights::HeadWeights,
    hub::{Hub, ModelFiles},
    kernels::{TileFormat, head::HeadFormat},
    model::Model,
    nn::{BitLinears, DenseLinears, HeadPrecision, LinearFactory, Vocabulary},
    pages,
    rows::Table,
    synthetic,
    text::Tokenizer,
    weights::TernaryWeight,
};

/// The name of the model inside this library.
pub const DEFAULT: &str = "default";

/// The embedding, and the head if it is tied to it.
const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// A head of its own.
const LM_HEAD: &str = "lm_head.weight";

/// Bytes from which a head does not fit the cache that a core can count on. A smaller one is multiplied as it is: a
/// screening would save reads of a cache, and cost what it takes to choose the rows.
const LARGE_HEAD: usize = 32 << 20;

/// How to take the weights of a checkpoint whose configuration says nothing of quantization.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As the configuration says; without a word of quantization in it, refuse.
    #[default]
    AsConfigured,
    /// Float weights are masters of a 1.58-bit model: ternarize them (Falcon-E `prequantized`).
    Ternarize,
    /// Float weights are what they are: run a plain Llama in full precision.
    Full,
    /// As the configuration says; without a word of quantization in it, in full precision. For
    /// looking at a model rather than running it.
    AsFound,
}

/// Where a model lies.
#[derive(Clone, Debug)]
pub enum Origin {
    /// In this library: the default model.
    Embedded,
    /// Nowhere: random weights are made as they are read ([`synthetic`]).
    Synthetic,
    /// On disk, in the Hub's layout.
    Files(Box<ModelFiles>),
    /// On disk, all in one file.
    Gguf(Box<Gguf>),
}

/// What [`Source::load`] makes a model of, read and checked as far as that goes without the weights.
pub struct Source {
    /// As the user named it.
    pub name: String,
    /// The validated `config.json`.
    pub config: Config,
    /// `generation_config.json`; its end-of-text ids include those of `config`.
    pub generation: GenerationConfig,
    /// The weights, opened but not read.
    pub checkpoint: Arc<Checkpoint>,
    /// Where it lies.
    pub origin: Origin,
    /// How [`Source::load`] stores the output head; exact unless it is changed.
    pub lm_head: HeadPrecision,
    /// How ternary weights lie in memory; [`Source::load`] measures which is faster unless it is set.
    pub tile_format: Option<TileFormat>,
}

/// Bytes of a loaded model's parts, keys and values aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// The projections of all layers.
    pub projections: u64,
    /// The embedding; 0 if its rows stay in the checkpoint.
    pub embedding: u64,
    /// The output head; 0 if it is the embedding.
    pub head: u64,
    /// Norms and biases.
    pub norms: u64,
}

impl WeightBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.projections + self.embedding + self.head + self.norms
    }
}

/// A loaded model with everything around it.
pub struct Pretrained {
    /// As the user named it.
    pub name: String,
    /// The network.
    pub model: Arc<Model>,
    /// `generation_config.json`; its end-of-text ids include those of `config.json`.
    pub generation: GenerationConfig,
    /// The tokenizer, if the checkpoint comes with one.
    pub tokenizer: Option<Tokenizer>,
}

/// The files of the default model, as they lie in `assets/default`.
mod embedded {
    macro_rules! asset {
        ($name:literal) => {
            include_bytes!(concat!("../assets/default/", $name))
        };
    }
    pub const CONFIG: &[u8] = asset!("config.json");
    pub const GENERATION_CONFIG: &[u8] = asset!("generation_config.json");
    pub const MODEL: &[u8] = asset!("model.safetensors");
    pub const TOKENIZER: &[u8] = asset!("tokenizer.json");
    pub const TOKENIZER_CONFIG: &[u8] = asset!("tokenizer_config.json");
}

/// The files of the embedded default model, by name, for writing them out.
pub fn default_files() -> [(&'static str, &'static [u8]); 5] {
    [
        ("config.json", embedded::CONFIG),
        ("generation_config.json", embedded::GENERATION_CONFIG),
        ("model.safetensors", embedded::MODEL),
        ("tokenizer.json", embedded::TOKENIZER),
        ("tokenizer_config.json", embedded::TOKENIZER_CONFIG),
    ]
}

impl Source {
    /// Finds `source` (a Hub repo id, a folder, a `.safetensors` or `.gguf` file, [`DEFAULT`],
    /// or `synthetic:` and one of [`synthetic::names`]) through `hub` and checks configuration and tensors against
    /// each other.
    ///
    /// # Errors
    /// A model that cannot be found or fetched; files that are damaged or contradict each other;
    /// float weights without a `quantization_config` unless `precision` says what they are.
    pub fn open(source: &str, precision: Precision, hub: &Hub) -> Result<Self> {
        let opened = match source {
            DEFAULT => Self::embedded()?,
            _ if source.starts_with(synthetic::PREFIX) => Self::synthetic(source)?,
            _ => Self::from_files(hub.resolve(source)?)?,
        };
        opened.with_precision(precision)
    }

    fn embedded() -> Result<Self> {
        let text = |bytes| String::from_utf8_lossy(bytes);
        let path = Path::new("embedded model");
        Ok(Self {
            name: DEFAULT.into(),
            config: Config::from_json(&path.join("config.json"), &text(embedded::CONFIG))?,
            generation: GenerationConfig::from_json(
                &path.join("generation_config.json"),
                &text(embedded::GENERATION_CONFIG),
            )?,
            checkpoint: Arc::new(Checkpoint::from_bytes("embedded model", embedded::MODEL)?),
            origin: Origin::Embedded,
            lm_head: HeadPrecision::Exact,
            tile_format: None,
        })
    }

    fn synthetic(name: &str) -> Result<Self> {
        let (config, checkpoint) = synthetic::open(name)?;
        Ok(Self {
            name: name.into(),
            config,
            generation: GenerationConfig::default(),
            checkpoint: Arc::new(checkpoint),
            origin: Origin::Synthetic,
            lm_head: HeadPrecision::Exact,
            tile_format: None,
        })
    }

    fn from_gguf(name: String, file: &Path) -> Result<Self> {
        let gguf = Gguf::open(file)?;
        Ok(Self {
            name,
            config: gguf.config().clone(),
            generation: gguf.generation()?,
            checkpoint: Arc::new(gguf.checkpoint()?),
            origin: Origin::Gguf(Box::new(gguf)),
            lm_head: HeadPrecision::Exact,
            tile_format: None,
        })
    }

    fn from_files(files: ModelFiles) -> Result<Self> {
        if let [file] = &files.weights[..]
            && Gguf::is_named_so(file)
        {
            return Self::from_gguf(files.source.clone(), file);
        }
        let config = Config::from_file(&files.config)?;
        let generation = match &files.generation_config {
            Some(path) => GenerationConfig::from_file(path)?,
            None => GenerationConfig::default(),
        };
        let checkpoint = Arc::new(Checkpoint::open(&files.weights)?);
        let name = files.source.clone();
        Ok(Self {
            name,
            config,
            generation,
            checkpoint,
            origin: Origin::Files(Box::new(files)),
            lm_head: HeadPrecision::Exact,
            tile_format: None,
        })
    }

    fn with_precision(mut self, precision: Precision) -> Result<Self> {
        let path = self.config_path();
        match precision {
            Precision::Ternarize => self.config = self.config.ternarize(&path)?,
            Precision::Full if self.config.quantization.is_some() => {
                return Err(Error::Config {
                    path,
                    field: "quantization_config".into(),
                    reason: "the model is quantized: it cannot run in full precision".into(),
                });
            }
            Precision::AsConfigured if self.config.quantization.is_none() => {
                self.config.check_tensors(&self.checkpoint)?;
                return Err(Error::Config {
                    path,
                    field: "quantization_config".into(),
                    reason:
                        "is absent, so these are full-precision weights: pass --ternarize if they \
                             are masters of a 1.58-bit model (Falcon-E `prequantized`), or \
                             --full-precision to run them as they are"
                            .into(),
                });
            }
            Precision::Full | Precision::AsConfigured | Precision::AsFound => {}
        }
        self.config.check_tensors(&self.checkpoint)?;
        for id in &self.config.eos_token_ids {
            if !self.generation.eos_token_ids.contains(id) {
                self.generation.eos_token_ids.push(*id);
            }
        }
        Ok(self)
    }

    fn config_path(&self) -> PathBuf {
        match &self.origin {
            Origin::Embedded => "embedded model/config.json".into(),
            Origin::Synthetic => format!("{}/config.json", self.name).into(),
            Origin::Files(files) => files.config.clone(),
            Origin::Gguf(gguf) => gguf.path().into(),
        }
    }

    /// Whether the model comes with a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        match &self.origin {
            Origin::Embedded => true,
            Origin::Synthetic => false,
            Origin::Files(files) => files.tokenizer.is_some(),
            Origin::Gguf(gguf) => gguf.has_tokenizer(),
        }
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let files = match &self.origin {
            Origin::Embedded => {
                let config = Some(embedded::TOKENIZER_CONFIG);
                return Tokenizer::from_bytes(embedded::TOKENIZER, config, None).map(Some);
            }
            Origin::Synthetic => return Ok(None),
            Origin::Gguf(gguf) => {
                return gguf.tokenizer_files()?.map(|f| from_gguf(gguf, &f)).transpose();
            }
            Origin::Files(files) => files,
        };
        let Some(tokenizer) = &files.tokenizer else { return Ok(None) };
        let tokenizer = Tokenizer::from_files(
            tokenizer,
            files.tokenizer_config.as_deref(),
            files.special_tokens_map.as_deref(),
            files.chat_template.as_deref(),
        )?;
        Ok(Some(tokenizer))
    }

    /// The contents of the tokenizer's files, if there is one: for another form of the model.
    ///
    /// # Errors
    /// Files that cannot be read or are no JSON.
    pub fn text_files(&self) -> Result<Option<TextFiles>> {
        let read = |path: &Option<PathBuf>| match path {
            Some(path) => std::fs::read(path).map(Some).map_err(Error::io(path)),
            None => Ok(None),
        };
        let (tokenizer, config, template) = match &self.origin {
            Origin::Synthetic => return Ok(None),
            Origin::Embedded => {
                let config = embedded::TOKENIZER_CONFIG.to_vec();
                (Some(embedded::TOKENIZER.to_vec()), Some(config), None)
            }
            Origin::Gguf(gguf) => match gguf.tokenizer_files()? {
                Some([(_, tokenizer), (_, config)]) => (Some(tokenizer), Some(config), None),
                None => return Ok(None),
            },
            Origin::Files(files) => (
                read(&files.tokenizer)?,
                read(&files.tokenizer_config)?,
                read(&files.chat_template)?,
            ),
        };
        let Some(tokenizer) = tokenizer else { return Ok(None) };
        let json = |file: &str, bytes: &[u8]| {
            let refuse = |e| Error::Tokenizer(format!("{}: {file}: {e}", self.name));
            serde_json::from_slice(bytes).map_err(refuse)
        };
        Ok(Some(TextFiles {
            tokenizer: json("tokenizer.json", &tokenizer)?,
            config: json("tokenizer_config.json", &config.unwrap_or_else(|| b"null".to_vec()))?,
            template: template.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        }))
    }

    /// Loads the weights for inference: packed codes stay packed, latent ones are packed one matrix at
    /// a time. The rows of large embeddings and heads stay in the checkpoint, which is read as they are
    /// needed; the head is in memory as `lm_head` says, screened if it is exact.
    pub fn load(&self, device: &Device) -> Result<Model> {
        let packed = self.config.quantization.map(|quantization| {
            let linears = BitLinears::new(quantization).with_format(self.tile_format());
            linears.reading(self.checkpoint.clone())
        });
        let linears: &dyn LinearFactory = match &packed {
            Some(linears) => linears,
            None => &DenseLinears,
        };
        let Some((embed_tokens, lm_head)) = self.stored_rows()? else {
            return self.load_with(linears, device);
        };
        let vb = self.checkpoint.var_builder(self.embedding_dtype(), device);
        Vocabulary::from_rows(embed_tokens, lm_head, self.lm_head)
            .and_then(|vocabulary| Model::with_vocabulary(&self.config, linears, vocabulary, vb))
            .map_err(|error| self.unusable(&error))
    }

    /// How [`load`](Self::load) lays out ternary weights: as asked for, else measured now.
    pub fn tile_format(&self) -> TileFormat {
        let weights = || self.config.projections().map(|(_, (out, input))| out * input).sum();
        self.tile_format.unwrap_or_else(|| fastest_format(weights()))
    }

    /// What the weights take once they are loaded: codes in padded tiles; embedding and head in bf16 if they are stored so or,
    /// if rows are read as they are needed ([`reads_rows`](Self::reads_rows)), the head alone, quantized or screened in 8 bits;
    /// the rest in f32.
    pub fn weight_bytes(&self, reads_rows: bool) -> WeightBytes {
        let config = &self.config;
        let float = self.embedding_dtype().size_in_bytes();
        let format = self.tile_format.unwrap_or_default();
        let projection = |(_, shape): (String, (usize, usize))| match config.quantization {
            Some(_) => TernaryWeight::size(shape, format),
            None => shape.0 * shape.1 * float,
        };
        let vocabulary = config.vocab_size * config.hidden_size * float;
        let (embedding, head) = match (reads_rows, self.lm_head) {
            (false, _) if config.tie_word_embeddings => (vocabulary, 0),
            (false, _) => (vocabulary, vocabulary),
            (true, precision) => {
                let format = match precision {
                    HeadPrecision::Exact => HeadFormat::Q8,
                    HeadPrecision::Quantized(format) => format,
                };
                (0, HeadWeights::size(config.vocab_size, config.hidden_size, format))
            }
        };
        WeightBytes {
            projections: config.projections().map(projection).sum::<usize>() as u64,
            embedding: embedding as u64,
            head: head as u64,
            norms: config.norm_parameters() * size_of::<f32>() as u64,
        }
    }

    /// Rows of embedding and head, unless these are small and exact.
    fn stored_rows(&self) -> Result<Option<(Table, Table)>> {
        if !self.reads_rows() {
            return Ok(None);
        }
        let table = |name| -> Result<_> {
            Ok(Table::new(Arc::new(StoredRows::new(&self.checkpoint, name)?)))
        };
        let embed_tokens = table(EMBED_TOKENS)?;
        let lm_head = match self.config.tie_word_embeddings {
            true => embed_tokens.clone(),
            false => table(LM_HEAD)?,
        };
        Ok(Some((embed_tokens, lm_head)))
    }

    /// Whether [`load`](Self::load) leaves the rows of embedding and head in the checkpoint.
    pub fn reads_rows(&self) -> bool {
        let bytes = self.checkpoint.get(EMBED_TOKENS).map_or(0, |info| info.bytes);
        self.lm_head != HeadPrecision::Exact || bytes >= LARGE_HEAD
    }

    /// What embedding and head, and the projections of a full-precision model, are in memory: bf16 if
    /// the embedding is stored so, else f32.
    pub fn embedding_dtype(&self) -> DType {
        match self.checkpoint.get(EMBED_TOKENS).map(|info| info.dtype) {
            Some(Dtype::BF16) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// Loads the weights through a linear factory of the caller's; embedding and head are tensors, through which
    /// gradients flow.
    pub fn load_with(&self, linears: &dyn LinearFactory, device: &Device) -> Result<Model> {
        let vb = self.checkpoint.var_builder(self.embedding_dtype(), device);
        Model::load(&self.config, linears, vb).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, error: &candle_core::Error) -> Error {
        Error::Checkpoint { path: self.checkpoint.path().into(), reason: error.to_string() }
    }
}

fn from_gguf(gguf: &Gguf, files: &TokenizerFiles) -> Result<Tokenizer> {
    let [(_, tokenizer), (_, config)] = files;
    Tokenizer::from_bytes(tokenizer, Some(config), None).map_err(|error| match error {
        Error::Tokenizer(reason) => {
            Error::Tokenizer(format!("{}: {reason}", gguf.path().display()))
        }
        other => other,
    })
}

impl Pretrained {
    /// Opens and loads `source`: a Hub repo id, a folder, a `.safetensors` or `.gguf` file, [`DEFAULT`],
    /// or a [`synthetic`] model.
    ///
    /// # Errors
    /// As [`Source::open`], and damaged weights or tokenizer files.
    pub fn open(source: &str) -> Result<Self> {
        Source::open(source, Precision::AsConfigured, &Hub::from_env())?
            .into_pretrained(&Device::Cpu)
    }
}

impl Source {
    /// Loads model and tokenizer, side by side.
    pub fn into_pretrained(self, device: &Device) -> Result<Pretrained> {
        let tokenizer = || {
            let tokenizer = self.tokenizer();
            pages::release_freed_memory(); // what reading it took, before the weights need it
            tokenizer
        };
        let (model, tokenizer) = rayon::join(|| self.load(device), tokenizer);
        Ok(Pretrained {
            model: Arc::new(model?),
            tokenizer: tokenizer?,
            name: self.name,
            generation: self.generation,
        })
    }
}
