//! GGUF files of llama.cpp and bitnet.cpp, read as the Hub's files of the same model: metadata become `config.json`,
//! `tokenizer.json` and `tokenizer_config.json`, tensors get the Hub's names and forms. What reads a repository of the Hub
//! so reads a GGUF file too.
//!
//! The format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Read are versions 2 and 3, little-endian, of
//! the architectures `bitnet-b1.58`, `bitnet-25`, `bitnet` and `llama`. Files are hostile until proven otherwise: every
//! count and every place is held against the bytes that are there before anything is allocated.

mod blocks;
mod config;
mod export;
mod header;
mod lora;
mod metadata;
mod names;
mod reader;
mod tensors;
mod tokenizer;
mod view;
mod vocabulary;
mod writer;

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::Arc,
};

pub(in crate::checkpoint) use self::view::View;
use self::{
    blocks::BlockType,
    config::Architecture,
    header::{Header, Stored},
    names::Meaning,
    view::{Matrix, RowOrder},
};
pub use self::{
    export::{Contents, FloatType, ProjectionType, Types, write},
    lora::{LoraContents, LoraPair, write_lora},
    vocabulary::TextFiles,
};
use super::{Checkpoint, source::Source};
use crate::{
    config::{Config, GenerationConfig},
    error::{Error, Result},
};

/// The projection whose type tells whether a model is ternary.
const FIRST_PROJECTION: &str = "blk.0.attn_q.weight";

/// `tokenizer.json` and `tokenizer_config.json`, by name.
pub type TokenizerFiles = [(&'static str, Vec<u8>); 2];

/// A GGUF file, opened and its header read.
#[derive(Clone, Debug)]
pub struct Gguf {
    path: PathBuf,
    source: Arc<Source>,
    header: Arc<Header>,
    /// The type of the first projection, and of all others if it is ternary.
    projections: BlockType,
    config: Config,
}

impl Gguf {
    /// Opens the file at `path` and validates what stands in front of its data.
    ///
    /// # Errors
    /// No GGUF file, a damaged one, or a model that is not supported.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_source(path, Source::open(path)?)
    }

    /// As [`open`](Self::open), of a file in memory; `name` stands for its path in errors.
    ///
    /// # Errors
    /// As there.
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_source(Path::new(name), Source::Memory(bytes.into()))
    }

    fn from_source(path: &Path, source: Source) -> Result<Self> {
        let header = Header::read(path, &source)?;
        let architecture = Architecture::of(&header)?;
        let wrong = |name: &str, reason: String| Error::Tensor {
            path: path.into(),
            name: name.into(),
            reason,
        };
        let Some(first) = header.tensors.get(FIRST_PROJECTION) else {
            return Err(wrong(FIRST_PROJECTION, "not in the file".into()));
        };
        let (block, _) = header.block(first).map_err(|reason| wrong(FIRST_PROJECTION, reason))?;
        let is_ternary = block.is_ternary() || has_three_values(path, &source, first, block)?;
        if !is_ternary && architecture != Architecture::Llama {
            let reason = format!(
                "is {} of more than three values: weights of a BitNet must be I2_S, TQ1_0, TQ2_0 or floats that are all \
                 −scale, 0 or scale; quantize the file with `llama-quantize`",
                block.name()
            );
            return Err(wrong(FIRST_PROJECTION, reason));
        }
        let json = config::config(&header, architecture, is_ternary)?;
        let config = Config::from_json(path, &json.to_string())
            .map_err(|error| config::name_key(&header, error))?;
        config::check_head_dim(&header, config.head_dim)?;
        let (source, header) = (Arc::new(source), Arc::new(header));
        Ok(Self { path: path.into(), source, header, projections: block, config })
    }

    /// Whether `path` has the extension of such a file.
    pub fn is_named_so(path: &Path) -> bool {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many tensors it has.
    pub fn tensors(&self) -> usize {
        self.header.tensors.len()
    }

    /// What `config.json` would say.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What `generation_config.json` would say: the tokens that end a text.
    pub fn generation(&self) -> Result<GenerationConfig> {
        Ok(GenerationConfig {
            bos_token_id: self.config.bos_token_id,
            eos_token_ids: config::end_tokens(&self.header, &self.source)?,
            ..GenerationConfig::default()
        })
    }

    /// Whether the file has a vocabulary.
    pub fn has_tokenizer(&self) -> bool {
        self.header.metadata.has(tokenizer::TOKENS)
    }

    /// `tokenizer.json` and `tokenizer_config.json`, if the file has a vocabulary.
    pub fn tokenizer_files(&self) -> Result<Option<TokenizerFiles>> {
        let Some(files) = tokenizer::files(&self.header.metadata, &self.source)? else {
            return Ok(None);
        };
        if let Some(template) = self.header.metadata.string(tokenizer::TEMPLATE)?
            && template.contains("BITNETAssistant:")
        {
            tracing::warn!(
                "{}: its chat template is not the one the model was trained with, which ends every turn with <|eot_id|>; \
                 give the right one with --chat-template FILE",
                self.path.display()
            );
        }
        Ok(Some([
            ("tokenizer.json", files.tokenizer.to_string().into_bytes()),
            ("tokenizer_config.json", files.config.to_string().into_bytes()),
        ]))
    }

    /// The tensors, under the Hub's names and in its forms.
    ///
    /// # Errors
    /// A tensor that no supported model has, that is damaged, or of a type that is not supported.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let mut view = View::new(self.source.clone());
        for (name, stored) in &self.header.tensors {
            self.add(&mut view, name, stored).map_err(|reason| Error::Tensor {
                path: self.path.clone(),
                name: name.clone(),
                reason,
            })?;
        }
        Checkpoint::from_sources(self.path.clone(), vec![(self.path.clone(), Source::Gguf(view))])
    }

    /// Adds the tensor `name` to the view.
    fn add(&self, view: &mut View, name: &str, stored: &Stored) -> Result<(), String> {
        let Some(meaning) = names::meaning(name) else {
            return Err("belongs to no model that is supported".into());
        };
        let (block, _) = self.header.block(stored)?;
        let mut matrix = Matrix {
            name: name.into(),
            start: stored.start,
            block,
            shape: stored.shape,
            order: RowOrder::Same,
            scale: None,
        };
        let hub_name = match meaning {
            Meaning::Factor => return Ok(()),
            Meaning::Float(hub_name) => {
                return view.push_matrix(hub_name, stored.dims.clone(), matrix);
            }
            Meaning::Projection(hub_name) => hub_name,
        };
        matrix.order = self.order(name, stored.shape.0)?;
        let is_ternary = self.config.quantization.is_some();
        if block.is_ternary() != self.projections.is_ternary() {
            let first = if block.is_ternary() { "not ternary" } else { "ternary" };
            return Err(format!(
                "is {}, and `{FIRST_PROJECTION}` is {first}: a model is ternary as a whole or not at all",
                block.name()
            ));
        }
        if is_ternary && !block.is_ternary() && !block.is_float() {
            return Err(format!("is {}, which holds no ternary weights", block.name()));
        }
        let factor = self.factor(name)?;
        if is_ternary {
            let scale = matrix.read_scale(&self.source)?;
            matrix.scale = Some(scale);
            view.push_number(format!("{hub_name}_scale"), scale * factor)?;
        } else if factor != 1. {
            return Err("has a scale beside it, which goes with ternary weights only".into());
        }
        view.push_matrix(hub_name, stored.dims.clone(), matrix)
    }

    /// The order of a projection's rows.
    fn order(&self, name: &str, rows: usize) -> Result<RowOrder, String> {
        match RowOrder::of_projection(name, &self.config) {
            RowOrder::Interleaved { head_dim } if !rows.is_multiple_of(head_dim) => {
                Err(format!("has {rows} rows, no whole heads of {head_dim}"))
            }
            order => Ok(order),
        }
    }

    /// The number that multiplies the output of the projection `name`: 1, unless a tensor of its own says otherwise.
    fn factor(&self, name: &str) -> Result<f32, String> {
        let name = format!("{}.scale", name.trim_end_matches(".weight"));
        let Some(stored) = self.header.tensors.get(&name) else { return Ok(1.) };
        let (block, _) = self.header.block(stored)?;
        if (block, stored.shape) != (BlockType::F32, (1, 1)) {
            return Err(format!("`{name}` beside it is not one F32"));
        }
        let mut bytes = [0; 4];
        let read = self.source.read_exact_at(&mut bytes, stored.start);
        read.map_err(|e| format!("`{name}` beside it cannot be read: {e}"))?;
        let factor = f32::from_le_bytes(bytes);
        match factor.is_finite() && factor > 0. {
            true => Ok(factor),
            false => Err(format!("`{name}` beside it is {factor}; it must be a positive number")),
        }
    }
}

/// Whether the matrix at `stored` begins with the floats of a ternary one: 0, a number and its negative.
fn has_three_values(
    path: &Path,
    source: &Source,
    stored: &Stored,
    block: BlockType,
) -> Result<bool> {
    /// By chance so many floats of another matrix are not of three values.
    const LOOKED_AT: usize = 4096;
    if !block.is_float() {
        return Ok(false);
    }
    let (_, bytes) = block.block();
    let mut data = vec![0; LOOKED_AT.min(stored.shape.0 * stored.shape.1) * bytes];
    source.read_exact_at(&mut data, stored.start).map_err(Error::io(path))?;
    let mut sizes = data.chunks_exact(bytes).map(|float| block.float(float).abs());
    let Some(scale) = sizes.find(|size| *size != 0.) else { return Ok(false) };
    Ok(scale.is_finite() && sizes.all(|size| size == 0. || size == scale))
}
