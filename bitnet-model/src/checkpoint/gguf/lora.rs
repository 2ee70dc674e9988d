//! A LoRA adapter → a GGUF file, as llama.cpp's `--lora` takes it.
//!
//! Beside a projection's output llama.cpp adds `alpha / rank · B(A x)`, with the rank that B has and one alpha for the whole
//! file (`llama-adapter.h`, `get_scale`); an alpha of 0 it takes for none, and adds `B(A x)`.

use std::path::Path;

use candle_core::Tensor;

use super::{
    blocks::BlockType,
    config::prefix_of,
    header::Header,
    names::{self, Meaning},
    view::RowOrder,
    writer::{Writer, padding},
};
use crate::{
    checkpoint::{source::Source, write::AtomicFile},
    config::Config,
    error::{Error, Result},
    storage::with_slice,
};

/// The two matrices beside one projection.
#[derive(Clone, Copy, Debug)]
pub struct LoraPair<'a> {
    /// The path of the projection: `model.layers.0.self_attn.q_proj`.
    pub path: &'a str,
    /// `A` (rank, in_features), f32.
    pub lora_a: &'a Tensor,
    /// `B` (out_features, rank), f32.
    pub lora_b: &'a Tensor,
    /// Multiplies the product of the two.
    pub scale: f64,
}

/// The adapter to write.
#[derive(Clone, Copy, Debug)]
pub struct LoraContents<'a> {
    /// Its name.
    pub name: &'a str,
    /// The name of the model it was trained on.
    pub base: Option<&'a str>,
    /// The configuration of that model.
    pub config: &'a Config,
    /// Its pairs, each of a projection of the model, with the shapes that this has.
    pub pairs: &'a [LoraPair<'a>],
}

/// A matrix to write: name, rows and columns, values.
struct Matrix {
    name: String,
    shape: (usize, usize),
    values: Vec<f32>,
}

/// Writes the adapter, F32, reads it back and compares.
///
/// The alpha of the file is that of most pairs; where a pair is scaled in another way, its B is multiplied by what is missing.
/// The file appears when it is complete.
///
/// # Errors
/// No pairs, one that is of no projection, a disk that is full, or a file that is not what was written.
pub fn write_lora(contents: LoraContents, path: &Path) -> Result<()> {
    let LoraContents { config, pairs, .. } = contents;
    let alpha = alpha(pairs)?;
    let mut matrices = Vec::with_capacity(2 * pairs.len());
    for pair in pairs {
        matrices.extend(matrices_of(pair, config, alpha)?);
    }
    let mut writer = Writer::default();
    writer.string("general.architecture", prefix_of(config));
    writer.string("general.type", "adapter");
    writer.string("general.name", contents.name);
    if let Some(base) = contents.base {
        writer.u32("general.base_model.count", 1);
        writer.string("general.base_model.0.name", base);
    }
    writer.u32("general.file_type", 0);
    writer.string("adapter.type", "lora");
    writer.f32("adapter.lora.alpha", alpha);
    for Matrix { name, shape: (rows, cols), values } in &matrices {
        writer.tensor(name, &[*rows, *cols], BlockType::F32, size_of_val(&values[..]) as u64);
    }
    let mut file = AtomicFile::create(path)?;
    file.write(&writer.into_bytes())?;
    for Matrix { values, .. } in &matrices {
        file.write(bytemuck::cast_slice(values))?;
        file.write(padding(size_of_val(&values[..]) as u64))?;
    }
    file.commit()?;
    verify(path, &matrices)
}

/// What `alpha` must be for most pairs to need no other factor.
fn alpha(pairs: &[LoraPair]) -> Result<f32> {
    let alphas = || pairs.iter().filter_map(own_alpha).map(|alpha| alpha as f32);
    let times = |alpha: f32| alphas().filter(|other| *other == alpha).count();
    let most = alphas().max_by_key(|alpha| times(*alpha));
    match most {
        Some(alpha) if alpha.is_finite() => Ok(alpha),
        Some(alpha) => Err(Error::Input(format!("an adapter of alpha {alpha} cannot be written"))),
        None if pairs.is_empty() => Err(Error::Input("the adapter has no pairs to write".into())),
        None => Ok(1.), // all pairs add nothing
    }
}

/// The alpha that makes the scale of `pair`; `None` if it adds nothing.
fn own_alpha(pair: &LoraPair) -> Option<f64> {
    let rank = pair.lora_a.dims().first()?;
    Some(pair.scale * *rank as f64).filter(|alpha| *alpha != 0.)
}

/// A and B of `pair` as they stand in the file.
fn matrices_of(pair: &LoraPair, config: &Config, alpha: f32) -> Result<[Matrix; 2]> {
    let is_projection =
        |name: &String| matches!(names::meaning(name), Some(Meaning::Projection(_)));
    let name = names::in_file(&format!("{}.weight", pair.path)).filter(is_projection);
    let Some(name) = name else {
        return Err(Error::Input(format!(
            "`{}` is no projection that GGUF has a name for",
            pair.path
        )));
    };
    let matrix = |which: &str, tensor: &Tensor| -> Result<Matrix> {
        let shape = tensor.dims2()?;
        let values = with_slice::<f32, _>(tensor, |values| Ok(values.to_vec()))?;
        Ok(Matrix { name: format!("{name}.{which}"), shape, values })
    };
    let a = matrix("lora_a", pair.lora_a)?;
    let mut b = matrix("lora_b", pair.lora_b)?;
    let factor = own_alpha(pair).unwrap_or(0.) / f64::from(alpha);
    if factor as f32 != 1. {
        b.values.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
    }
    let order = RowOrder::of_projection(&name, config);
    if order != RowOrder::Same {
        let (rows, rank) = b.shape;
        let mut values = vec![0.; rows * rank];
        for (row, from) in b.values.chunks_exact(rank).enumerate() {
            values[order.stored(row) * rank..][..rank].copy_from_slice(from);
        }
        b.values = values;
    }
    Ok([a, b])
}

/// Reads back what was written and compares it, bit for bit.
fn verify(path: &Path, matrices: &[Matrix]) -> Result<()> {
    let source = Source::open(path)?;
    let header = Header::read(path, &source)?;
    for Matrix { name, shape, values } in matrices {
        let wrong =
            |reason: String| Error::Tensor { path: path.into(), name: name.clone(), reason };
        let stored = header.tensors.get(name).filter(|stored| stored.shape == *shape);
        let Some(stored) = stored else {
            return Err(wrong("read back, it is not there in its shape".into()));
        };
        let (_, bytes) = header.block(stored).map_err(wrong)?;
        let mut found = vec![0; bytes as usize];
        source
            .read_exact_at(&mut found, stored.start)
            .map_err(|e| wrong(format!("cannot be read: {e}")))?;
        if found != bytemuck::cast_slice::<_, u8>(values) {
            return Err(wrong("read back, it is not what was written".into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// A Llama of one layer with heads of 4.
    fn config() -> Config {
        let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 8}"#;
        Config::from_json(Path::new("config.json"), json).unwrap()
    }

    fn matrix(rows: usize, cols: usize, from: f32) -> Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|i| from + i as f32).collect();
        Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
    }

    fn read(path: &Path, name: &str) -> Vec<f32> {
        let source = Source::open(path).unwrap();
        let header = Header::read(path, &source).unwrap();
        let stored = &header.tensors[name];
        let mut bytes = vec![0; stored.shape.0 * stored.shape.1 * 4];
        source.read_exact_at(&mut bytes, stored.start).unwrap();
        bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[test]
    fn one_alpha_for_all_and_rows_as_the_base_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapter.gguf");
        let (a, b, wide) = (matrix(2, 8, 0.), matrix(8, 2, 1.), matrix(4, 8, 0.));
        let (narrow, zero) = (matrix(8, 4, 1.), matrix(4, 2, 1.));
        let pair = |path, lora_a, lora_b, scale| LoraPair { path, lora_a, lora_b, scale };
        // alpha 8, alpha 8 of another rank, alpha 2, and a pair that adds nothing.
        let pairs = [
            pair("model.layers.0.self_attn.q_proj", &a, &b, 4.),
            pair("model.layers.0.mlp.up_proj", &wide, &narrow, 2.),
            pair("model.layers.0.mlp.down_proj", &a, &b, 1.),
            pair("model.layers.0.self_attn.v_proj", &a, &zero, 0.),
        ];
        let config = config();
        let contents = LoraContents { name: "x", base: Some("y"), config: &config, pairs: &pairs };
        write_lora(contents, &path).unwrap();
        let header = Header::read(&path, &Source::open(&path).unwrap()).unwrap();
        assert_eq!(header.metadata.number("adapter.lora.alpha").unwrap(), Some(8.));
        assert_eq!(header.metadata.string("general.type").unwrap(), Some("adapter"));
        assert_eq!(header.metadata.string("general.architecture").unwrap(), Some("llama"));
        // Rows 0, 2, 1, 3 of each head of 4, as llama.cpp turns neighbours.
        let order = [0, 2, 1, 3, 4, 6, 5, 7];
        let rows = order.iter().flat_map(|row| [1. + 2. * *row as f32, 2. + 2. * *row as f32]);
        assert_eq!(read(&path, "blk.0.attn_q.weight.lora_b"), rows.collect::<Vec<_>>());
        assert_eq!(
            read(&path, "blk.0.attn_q.weight.lora_a"),
            (0..16).map(|i| i as f32).collect::<Vec<_>>()
        );
        assert_eq!(
            read(&path, "blk.0.ffn_up.weight.lora_b"),
            (1..33).map(|i| i as f32).collect::<Vec<_>>()
        );
        // A quarter of the alpha is in B.
        let quarter: Vec<f32> = (1..17).map(|i| i as f32 / 4.).collect();
        assert_eq!(read(&path, "blk.0.ffn_down.weight.lora_b"), quarter);
        assert_eq!(read(&path, "blk.0.attn_v.weight.lora_b"), [0.; 8]);

        let error = write_lora(LoraContents { pairs: &[], ..contents }, &path).unwrap_err();
        assert!(error.to_string().contains("no pairs"), "{error}");
        let head = [pair("lm_head", &a, &b, 1.)];
        let error = write_lora(LoraContents { pairs: &head, ..contents }, &path).unwrap_err();
        assert!(error.to_string().contains("`lm_head`"), "{error}");
    }
}
