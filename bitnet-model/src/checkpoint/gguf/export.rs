//! A model of the Hub's layout → a GGUF file.

use std::path::Path;

use candle_core::DType;

use super::{
    blocks::BlockType,
    config::prefix_of,
    names,
    view::RowOrder,
    vocabulary::{self, TextFiles},
    writer::{Writer, padding},
};
use crate::{
    checkpoint::{Checkpoint, Dtype, export::ternary, write::AtomicFile},
    config::{Config, Family, Quantization},
    error::{Error, Result},
    quant::Scheme,
};

/// How ternary weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TernaryType {
    /// 2 bits a weight and one scale, for bitnet.cpp.
    I2S,
    /// 1.69 bits, for llama.cpp.
    Tq1_0,
    /// 2.06 bits, for llama.cpp.
    Tq2_0,
}

impl TernaryType {
    fn block(self) -> BlockType {
        match self {
            Self::I2S => BlockType::I2S,
            Self::Tq1_0 => BlockType::Tq1_0,
            Self::Tq2_0 => BlockType::Tq2_0,
        }
    }

    /// llama.cpp's and bitnet.cpp's number for files of this type.
    fn file_type(self) -> u32 {
        match self {
            Self::I2S => 40,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
        }
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

/// Writes a file whose projections are of `ternary`; `on_tensor` hears of each tensor written and how many there are.
///
/// The embedding and the head keep their element type, norms become F32, as llama.cpp wants them. The file appears when it
/// is complete.
///
/// # Errors
/// What the format has no place for: full precision, other quantizers than b1.58's, norms of their own before projections,
/// rows that are no whole blocks, a tokenizer of another kind.
pub fn write(
    contents: Contents,
    ternary: TernaryType,
    path: &Path,
    mut on_tensor: impl FnMut(usize, usize),
) -> Result<()> {
    let Contents { config, checkpoint, .. } = contents;
    config.check_tensors(checkpoint)?;
    let quantization = quantization(contents)?;
    let tensors = plan(contents, ternary.block())?;
    let mut writer = Writer::default();
    metadata(&mut writer, contents, ternary);
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
        let data = tensor.data(config, checkpoint, quantization)?;
        debug_assert_eq!(data.len() as u64, tensor.bytes(), "{}", tensor.name);
        file.write(&data)?;
        file.write(padding(data.len() as u64))?;
        on_tensor(index + 1, tensors.len());
    }
    file.commit()
}

/// How the model is quantized, if the format has a place for it.
fn quantization(contents: Contents) -> Result<Quantization> {
    let refuse = |field: &str, reason: &str| {
        let (path, field) =
            (contents.checkpoint.path().into(), format!("quantization_config{field}"));
        Err(Error::Config { path, field, reason: reason.into() })
    };
    match contents.config.quantization {
        None => refuse("", "is absent: a full-precision model has no ternary weights to write"),
        Some(quantization) if quantization.scheme != Scheme::B158 => refuse(
            "",
            "says of quantizers what a GGUF file cannot: only those of b1.58 are written",
        ),
        Some(Quantization { input_norm_eps: Some(_), .. }) => refuse(
            ".use_rms_norm",
            "is true: norms before each projection have no place in a GGUF file",
        ),
        Some(quantization) => Ok(quantization),
    }
}

/// A tensor to write.
struct Planned {
    /// Its name in the checkpoint.
    source: String,
    /// Its name in the file.
    name: String,
    dims: Vec<usize>,
    block: BlockType,
}

/// All tensors of the model, projections of type `ternary`.
fn plan(contents: Contents, ternary: BlockType) -> Result<Vec<Planned>> {
    let Contents { config, checkpoint, .. } = contents;
    let (weights, _) = ternary.block();
    let mut tensors = Vec::new();
    for source in checkpoint.names() {
        let Some(name) = names::in_file(source) else { continue };
        if config.tie_word_embeddings && name == names::HEAD {
            continue;
        }
        let Some(info) = checkpoint.get(source) else { continue };
        tensors.push(Planned {
            source: source.into(),
            name: name.clone(),
            dims: info.shape.to_vec(),
            block: match info.dtype {
                _ if name.contains("norm") => BlockType::F32,
                Dtype::BF16 => BlockType::Bf16,
                Dtype::F16 => BlockType::F16,
                _ => BlockType::F32,
            },
        });
    }
    for (source, (rows, cols)) in config.projections() {
        if !cols.is_multiple_of(weights) {
            let reason =
                format!("has rows of {cols}, no whole blocks of {weights} {}", ternary.name());
            return Err(checkpoint.wrong(&source, reason));
        }
        let Some(tensor) = tensors.iter_mut().find(|tensor| tensor.source == source) else {
            continue;
        };
        (tensor.dims, tensor.block) = (vec![rows, cols], ternary);
    }
    Ok(tensors)
}

fn metadata(writer: &mut Writer, contents: Contents, ternary: TernaryType) {
    let Contents { name, config, .. } = contents;
    let prefix = prefix_of(config);
    writer.string("general.architecture", prefix);
    writer.string("general.type", "model");
    writer.string("general.name", name);
    writer.u32("general.file_type", ternary.file_type());
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

impl Planned {
    fn bytes(&self) -> u64 {
        let (weights, bytes) = self.block.block();
        let elements: usize = self.dims.iter().product();
        (elements / weights * bytes + self.block.tail()) as u64
    }

    fn data(
        &self,
        config: &Config,
        checkpoint: &Checkpoint,
        quantization: Quantization,
    ) -> Result<Vec<u8>> {
        match (self.block, &self.dims[..]) {
            (block, &[rows, cols]) if block.is_ternary() => {
                self.codes(config, checkpoint, (rows, cols), quantization)
            }
            (BlockType::F32, _) => {
                let tensor = checkpoint.read(&self.source)?.to_dtype(DType::F32)?;
                let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
                Ok(bytemuck::cast_slice(&values).to_vec())
            }
            _ => checkpoint.read_bytes(&self.source),
        }
    }

    /// The blocks of a projection, its rows in the order of the file.
    fn codes(
        &self,
        config: &Config,
        checkpoint: &Checkpoint,
        (rows, cols): (usize, usize),
        quantization: Quantization,
    ) -> Result<Vec<u8>> {
        let wrong = |reason: String| checkpoint.wrong(&self.source, reason);
        let weight = ternary(checkpoint, &self.source, (rows, cols), quantization)?;
        let packed = weight.to_packed().map_err(|e| wrong(e.to_string()))?;
        let order = match config.family {
            Family::Llama => RowOrder::of_projection(&self.name, config.head_dim),
            Family::BitNet | Family::OneBitLlm => RowOrder::Same,
        };
        let (weights, bytes) = self.block.block();
        let mut data = vec![0; self.bytes() as usize];
        let mut codes = vec![0; cols];
        for row in 0..rows {
            let (field, byte) = (row / (rows / 4), row % (rows / 4));
            for (code, byte) in codes.iter_mut().zip(&packed[byte * cols..][..cols]) {
                *code = byte >> (2 * field) & 3;
            }
            let at = order.stored(row) * (cols / weights * bytes);
            let blocks = data[at..].chunks_exact_mut(bytes);
            for (codes, block) in codes.chunks_exact(weights).zip(blocks) {
                self.block.pack(codes, weight.scale(), block).map_err(wrong)?;
            }
        }
        if self.block == BlockType::I2S {
            let at = data.len() - self.block.tail();
            data[at..at + 4].copy_from_slice(&weight.scale().to_le_bytes());
        }
        Ok(data)
    }
}
