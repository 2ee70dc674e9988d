//! The model card beside what is written: `README.md` as the Hub shows it, with the metadata that it reads.

use std::{fmt::Write, fs, path::Path};

use bitnet_model::{
    adapter::Adapter,
    checkpoint::write_atomic,
    config::{Activation, Config, Family, ScaleConvention, WeightForm},
    pretrained::{DEFAULT, Origin, Source},
};

use crate::{engines, progress};

/// What every card of this program says, by which it knows its own.
const MADE_WITH: &str = "Made with `bitnet convert`";

/// Metadata of a card that hold for every form of a model.
const KEPT: [&str; 6] =
    ["license", "license_name", "license_link", "language", "datasets", "base_model"];

/// The card of a model.
pub struct Card<'a> {
    /// What was converted.
    pub source: &'a Source,
    /// The configuration of what was written.
    pub config: &'a Config,
    /// What was written: `--to`.
    pub form: String,
    /// The options beside it that matter.
    pub options: String,
    /// Element types by what has them.
    pub types: &'a [(&'a str, String)],
    /// Bytes of the weights.
    pub bytes: u64,
    /// Folder or file.
    pub output: &'a Path,
}

/// Whether a card that this program wrote is at `path`.
pub fn is_card(path: &Path) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.contains(MADE_WITH))
}

impl Card<'_> {
    /// Writes the card to `path`.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        Ok(write_atomic(path, self.text()?.as_bytes())?)
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let name = self.output.file_name().unwrap_or_default().to_string_lossy();
        let library = match &*self.form {
            "packed" | "latent" => "transformers",
            "onnx" => "onnx",
            _ => "gguf",
        };
        let mut out = front_matter(self.source, library, &self.form);
        writeln!(out, "\n# {name}\n")?;
        writeln!(out, "{}", self.summary())?;
        writeln!(out, "\n## Weights\n\n| | |\n|---|---|")?;
        for (what, value) in self.geometry() {
            writeln!(out, "| {what} | {value} |")?;
        }
        for (what, value) in self.types {
            writeln!(out, "| {what} | {value} |")?;
        }
        writeln!(out, "| scale | {} |", self.scale())?;
        writeln!(out, "| size | {} |", progress::bytes(self.bytes))?;
        writeln!(out, "\n## How it was made\n")?;
        let (command, version) = (self.command(&name), env!("CARGO_PKG_VERSION"));
        writeln!(out, "{MADE_WITH} {version}, which compared every code with the source's:\n")?;
        writeln!(out, "```sh\n{command}\n```\n\n## How to run it\n")?;
        if self.form != "onnx" {
            writeln!(
                out,
                "```sh\nbitnet chat -m {name}\nbitnet generate -m {name} \"Once upon a time\"\n```\n"
            )?;
        }
        writeln!(out, "| engine | runs it |\n|---|---|")?;
        for (engine, verdict) in self.engines() {
            let verdict = match verdict {
                Ok(how) => how.into(),
                Err(reason) => format!("no: {reason}"),
            };
            writeln!(out, "| {engine} | {verdict} |")?;
        }
        Ok(out)
    }

    /// The command, without folders of this machine.
    fn command(&self, name: &str) -> String {
        let input = repository(self.source)
            .unwrap_or_else(|| self.source.name.rsplit('/').next().unwrap_or(DEFAULT));
        format!("bitnet convert {input} {name} --to {}{}", self.form, self.options)
    }

    fn summary(&self) -> String {
        let family = match self.config.family {
            Family::Llama => "A 1.58-bit Llama",
            Family::BitNet | Family::OneBitLlm => "A BitNet b1.58 language model",
        };
        let from = match repository(self.source) {
            Some(repository) => {
                format!(", converted from [{repository}](https://huggingface.co/{repository})")
            }
            None => String::new(),
        };
        let millions = self.config.parameters() as f64 / 1e6;
        format!(
            "{family} of {millions:.1} million parameters{from}: its projections are ternary, −scale, 0 or scale."
        )
    }

    fn geometry(&self) -> Vec<(&'static str, String)> {
        let &Config { num_hidden_layers, hidden_size, intermediate_size, vocab_size, .. } =
            self.config;
        let (heads, kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let gate = match self.config.hidden_act {
            Activation::Relu2 => "relu²",
            Activation::Silu => "SiLU",
        };
        let norms = match self.config.family {
            Family::Llama => "no sub-norms",
            Family::BitNet | Family::OneBitLlm => "sub-norms",
        };
        let head = if self.config.tie_word_embeddings { "the embedding" } else { "of its own" };
        vec![
            ("architecture", format!("{norms}, {gate}, {heads}/{kv_heads} heads, head {head}")),
            (
                "geometry",
                format!(
                    "{num_hidden_layers} layers, hidden {hidden_size}, intermediate {intermediate_size}, vocabulary \
                     {vocab_size}, context {}",
                    self.config.max_position_embeddings
                ),
            ),
            ("quantizers", self.quantizers()),
        ]
    }

    fn quantizers(&self) -> String {
        let Some(quantization) = self.config.quantization else { return "none".into() };
        match quantization.scheme {
            bitnet_model::quant::Scheme::B158 => {
                "weights by absmean to −1, 0, 1; activations by absmax to 8 bits a token".into()
            }
            scheme => scheme.to_string(),
        }
    }

    /// What a scale is, and where it stands.
    fn scale(&self) -> &'static str {
        let weights = self.config.quantization.map(|quantization| quantization.weights);
        match (&*self.form, weights) {
            ("i2_s", _) => "one f32 behind the codes of a matrix; multiplies",
            ("tq1_0" | "tq2_0", _) => {
                "an f16 in each block of 256, the same in all blocks of a matrix; multiplies"
            }
            ("onnx", _) => "one f32 of a matrix, divided by that of a token's activations",
            ("f16", _) => "rounded to f16; the size of every weight that is not 0",
            (_, Some(WeightForm::Packed(ScaleConvention::Multiply))) => {
                "`weight_scale` of a matrix: weight = code · weight_scale"
            }
            (_, Some(WeightForm::Packed(ScaleConvention::Divide))) => {
                "`weight_scale` of a matrix: weight = code / weight_scale"
            }
            _ => "the mean of the absolute values of a matrix",
        }
    }

    fn engines(&self) -> Vec<(&'static str, Result<&'static str, &'static str>)> {
        match &*self.form {
            "packed" | "latent" => {
                vec![("bitnet", Ok("yes")), ("transformers", engines::transformers(self.config))]
            }
            "onnx" => vec![("ONNX Runtime", Ok("yes")), ("bitnet", Err("it writes ONNX only"))],
            _ => vec![
                ("bitnet", Ok("yes")),
                ("llama.cpp", engines::llama_cpp(self.config, &self.form)),
                ("bitnet.cpp", engines::bitnet_cpp(self.config, &self.form)),
            ],
        }
    }
}

/// The card of an adapter in the file `output`, that was made of `input` for `base`.
pub fn of_adapter(
    adapter: &Adapter,
    input: &str,
    base: &Source,
    output: &Path,
) -> Result<String, std::fmt::Error> {
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let base_name = repository(base).unwrap_or(&base.name);
    let mut out = String::from("---\n");
    if let Some(repository) = repository(base) {
        writeln!(out, "base_model: {repository}\nbase_model_relation: adapter")?;
    }
    writeln!(
        out,
        "library_name: gguf\npipeline_tag: text-generation\ntags:\n- bitnet\n- lora\n---\n\n# {name}\n"
    )?;
    writeln!(
        out,
        "A LoRA adapter for {base_name}: {} pairs of rank {}, alpha {}, {} parameters, F32. It stays beside the ternary base.\n",
        adapter.pairs.len(),
        adapter.config.rank,
        adapter.config.alpha,
        progress::count(adapter.parameters() as u64)
    )?;
    writeln!(out, "{MADE_WITH} {}:\n", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "```sh\nbitnet convert {input} {name} --to lora\n```\n")?;
    match engines::llama_cpp(&base.config, "tq2_0") {
        Ok(_) => {
            writeln!(out, "llama.cpp applies it (`--lora {name}`) to the GGUF file of its base.")?
        }
        Err(reason) => writeln!(out, "llama.cpp does not run its base: {reason}.")?,
    }
    writeln!(out, "`bitnet` takes the folder it was made of: `--adapter {input}`.")?;
    Ok(out)
}

/// The repository of the Hub that `source` came from.
fn repository(source: &Source) -> Option<&str> {
    let is_of_hub = matches!(source.origin, Origin::Files(_) | Origin::Gguf(_));
    if !is_of_hub || Path::new(&source.name).exists() {
        return None;
    }
    // `org/name`, or `org/name/file`.
    let end = source.name.match_indices('/').nth(1).map_or(source.name.len(), |(at, _)| at);
    Some(&source.name[..end])
}

/// The metadata: what the source's card says of its licence and origin, and what is known of the form.
fn front_matter(source: &Source, library: &str, form: &str) -> String {
    let card = match &source.origin {
        Origin::Files(files) => fs::read_to_string(files.root.join("README.md")).ok(),
        Origin::Gguf(gguf) => fs::read_to_string(gguf.path().with_extension("md")).ok(),
        Origin::Embedded | Origin::Synthetic => None,
    };
    let mut kept = card.as_deref().map(kept).unwrap_or_default();
    if matches!(source.origin, Origin::Embedded) {
        kept = "license:\n- mit\n- apache-2.0\nlanguage: en\n".into();
    }
    if let Some(repository) = repository(source) {
        kept = without(&kept, "base_model");
        kept += &format!("base_model: {repository}\n");
    }
    format!(
        "---\n{kept}library_name: {library}\npipeline_tag: text-generation\ntags:\n- bitnet\n- 1.58-bit\n- ternary\n- {form}\n---\n"
    )
}

/// The entries of a card's metadata that hold for every form.
fn kept(card: &str) -> String {
    let Some(rest) = card.strip_prefix("---\n") else { return String::new() };
    let Some((metadata, _)) = rest.split_once("\n---") else { return String::new() };
    entries(metadata).filter(|(key, _)| KEPT.contains(key)).map(|(_, entry)| entry).collect()
}

/// `metadata` without the entry `key`.
fn without(metadata: &str, key: &str) -> String {
    entries(metadata).filter(|(name, _)| *name != key).map(|(_, entry)| entry).collect()
}

/// The entries of YAML, each with the lines that belong to it: those that begin with a space or a dash.
fn entries(metadata: &str) -> impl Iterator<Item = (&str, String)> {
    let mut entries: Vec<(&str, String)> = Vec::new();
    for line in metadata.lines() {
        match (line.starts_with([' ', '-', '#']), entries.last_mut()) {
            (false, _) => {
                let key = line.split(':').next().unwrap_or(line);
                entries.push((key, format!("{line}\n")));
            }
            (true, Some((_, entry))) => *entry += &format!("{line}\n"),
            (true, None) => {}
        }
    }
    entries.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_and_origin_are_kept() {
        let card = "---\nlicense: other\nlicense_link: a\ntags:\n- x\nlanguage:\n- en\n- de\npipeline_tag: y\n---\n# A\nlicense: b\n";
        let found = kept(card);
        assert_eq!(found, "license: other\nlicense_link: a\nlanguage:\n- en\n- de\n");
        assert_eq!(without(&found, "language"), "license: other\nlicense_link: a\n");
        assert_eq!(kept("# no metadata"), "");
    }
}
