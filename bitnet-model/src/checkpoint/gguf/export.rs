//! A model of the Hub's layout → a GGUF file.

use std::path::Path;

use super::{
    blocks::BlockType,
    config::prefix_of,
    names,
    tensors::{Content, Planned},
    vocabulary::{self, TextFiles},
    writer::{Writer, padding},
};
use crate::{
    checkpoint::{Checkpoint, Dtype, export::b158, write::AtomicFile},
    config::{Config, Quantization},
    error::{Error, Result},
};

/// How ternary weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProjectionType {
    /// 2 bits a weight and one scale, for bitnet.cpp.
    I2S,
    /// 1.69 bits, for llama.cpp.
    Tq1_0,
    /// 2.06 bits, for llama.cpp.
    Tq2_0,
    /// 16 bits: every weight is −scale, 0 or scale, for what knows no ternary type.
    F16,
}

impl ProjectionType {
    fn block(self) -> BlockType {
        match self {
            Self::I2S => BlockType::I2S,
            Self::Tq1_0 => BlockType::Tq1_0,
            Self::Tq2_0 => BlockType::Tq2_0,
            Self::F16 => BlockType::F16,
        }
    }

    /// llama.cpp's and bitnet.cpp's number for files of this type.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
            Self::I2S => 40,
        }
    }
}

/// How the embedding or the head is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// 32 bits: nothing is lost.
    F32,
    /// 16 bits, 11 of them significant.
    F16,
    /// 16 bits, 8 of them significant.
    Bf16,
    /// 8.5 bits a weight.
    Q8_0,
    /// 6.56 bits a weight.
    Q6K,
}

impl FloatType {
    fn block(self) -> BlockType {
        match self {
            Self::F32 => BlockType::F32,
            Self::F16 => BlockType::F16,
            Self::Bf16 => BlockType::Bf16,
            Self::Q8_0 => BlockType::Q8_0,
            Self::Q6K => BlockType::Q6K,
        }
    }
}

/// The types of the tensors to write. Norms are F32, as llama.cpp wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Types {
    /// Of the projections.
    pub projections: ProjectionType,
    /// Of the embedding, and of the head if it is the embedding; `None` keeps it.
    pub embedding: Option<FloatType>,
    /// Of a head of its own; `None` keeps it.
    pub head: Option<FloatType>,
}

impl From<ProjectionType> for Types {
    /// Embedding and head stay as they are.
    fn from(projections: ProjectionType) -> Self {
        Self { projections, embedding: None, head: None }
    }
}

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The model's name.
    pub name: &'a str,
    /// Its configuration, ternary.
    pub config: &'a Config,
    /// Its weights, packed or masters.
    pub checkpoint: &'a Checkpoint,
    /// Its tokenizer, if it has one.
    pub text: Option<&'a TextFiles>,
}

/// Writes a file of tensors of these `types`; `on_tensor` hears of each tensor written and how many there are.
///
/// The file appears when it is complete.
///
/// # Errors
/// What the format has no place for: full precision, other quantizers than b1.58's, norms of their own before projections,
/// rows that are no whole blocks, numbers that a type cannot hold, a tokenizer of another kind.
pub fn write(
    contents: Contents,
    types: Types,
    path: &Path,
    mut on_tensor: impl FnMut(usize, usize),
) -> Result<()> {
    let Contents { config, checkpoint, .. } = contents;
    config.check_tensors(checkpoint)?;
    let quantization = quantization(contents)?;
    let tensors = plan(contents, types)?;
    let mut writer = Writer::default();
    metadata(&mut writer, contents, types.projections);
    if let Some(text) = contents.text {
        let refuse = |reason| Error::Tokenizer(format!("{}: {reason}", contents.name));
        vocabulary::write(&mut writer, text, config).map_err(refuse)?;
    } else {
        writer.string(super::tokenizer::MODEL, "none");
    }
    for tensor in &tensors {
        writer.tensor(&tensor.name, &tensor.dims, tensor.block, tensor.bytes());
    }
    let mut file = AtomicFile::create(path)?;
    file.write(&writer.into_bytes())?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut written = 0;
        tensor.write(config, checkpoint, quantization, |data| {
            written += data.len() as u64;
            file.write(data)
        })?;
        debug_assert_eq!(written, tensor.bytes(), "{}", tensor.name);
        file.write(padding(written))?;
        on_tensor(index + 1, tensors.len());
    }
    file.commit()
}

/// How the model is quantized, if the format has a place for it.
fn quantization(Contents { config, checkpoint, .. }: Contents) -> Result<Quantization> {
    let other = "says of quantizers what a GGUF file cannot: only those of b1.58 are written";
    let quantization = b158(config, checkpoint, other)?;
    if quantization.input_norm_eps.is_some() {
        return Err(Error::Config {
            path: checkpoint.path().into(),
            field: "quantization_config.use_rms_norm".into(),
            reason: "is true: norms before each projection have no place in a GGUF file".into(),
        });
    }
    Ok(quantization)
}

/// All tensors of the model.
fn plan(contents: Contents, types: Types) -> Result<Vec<Planned>> {
    let Contents { config, checkpoint, .. } = contents;
    if config.tie_word_embeddings && types.head.is_some() {
        let reason = "the model has no head of its own, so there is none to give a type: give one to the embedding";
        return Err(Error::Input(format!("{}: {reason}", contents.name)));
    }
    let mut tensors = Vec::new();
    for source in checkpoint.names() {
        let Some(name) = names::in_file(source) else { continue };
        if config.tie_word_embeddings && name == names::HEAD {
            continue;
        }
        let Some(info) = checkpoint.get(source) else { continue };
        let stored = match info.dtype {
            Dtype::BF16 => BlockType::Bf16,
            Dtype::F16 => BlockType::F16,
            _ => BlockType::F32,
        };
        let chosen = match &*name {
            names::EMBEDDING => types.embedding,
            names::HEAD => types.head,
            _ => Some(FloatType::F32), // a norm
        };
        tensors.push(Planned {
            source: source.into(),
            dims: info.shape.to_vec(),
            block: chosen.map_or(stored, FloatType::block),
            content: Content::Floats { stored },
            name,
        });
    }
    for (source, (rows, cols)) in config.projections() {
        let Some(tensor) = tensors.iter_mut().find(|tensor| tensor.source == source) else {
            continue;
        };
        (tensor.dims, tensor.block) = (vec![rows, cols], types.projections.block());
        tensor.content = Content::Ternary { rows, cols };
    }
    for Planned { source, dims, block, .. } in &tensors {
        let (weights, _) = block.block();
        if let Some(cols) = dims.last().filter(|cols| !cols.is_multiple_of(weights)) {
            let reason =
                format!("has rows of {cols}, no whole blocks of {weights} {}", block.name());
            return Err(checkpoint.wrong(source, reason));
        }
    }
    Ok(tensors)
}

fn metadata(writer: &mut Writer, contents: Contents, projections: ProjectionType) {
    let Contents { name, config, .. } = contents;
    let prefix = prefix_of(config);
    writer.string("general.architecture", prefix);
    writer.string("general.type", "model");
    writer.string("general.name", name);
    writer.u32("general.file_type", projections.file_type());
    writer.u32("general.quantization_version", 2);
    for (key, value) in [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.head_dim),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
    ] {
        // A validated configuration: none exceeds 2²⁸.
        writer.u32(&format!("{prefix}.{key}"), value as u32);
    }
    writer.f32(&format!("{prefix}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps as f32);
    writer.f32(&format!("{prefix}.rope.freq_base"), config.rope_theta as f32);
    // Further ends of a text are found by their names.
    let ends = config.eos_token_ids.first().copied();
    for (key, id) in [("bos", config.bos_token_id), ("eos", ends)] {
        if let Some(id) = id {
            writer.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
}
