//! What a run leaves behind: the best weights as models that the Hub's tools load.

use std::{fs, path::Path};

use bitnet_model::{
    checkpoint::{
        Checkpoint,
        export::{Target, convert},
        write_atomic,
    },
    config::{Config, GenerationConfig},
    hub::ModelFiles,
    quant::WeightKind,
};

use crate::{
    Error, Result,
    dataset::Vocabulary,
    lora,
    recipe::{Lora, Recipe},
};

/// The folder of the adapter in the output folder.
const ADAPTER: &str = "adapter";

/// Writes `latent/` and, if the weights are quantized, `packed/` into the output folder of `recipe`.
///
/// `best` is the file of the best weights, `start` are the files of the checkpoint that the run went on from: its tokenizer
/// and generation settings stay with it.
pub(super) fn export(
    recipe: &Recipe,
    config: &Config,
    vocabulary: &Vocabulary,
    start: Option<&ModelFiles>,
    best: &Path,
) -> Result<()> {
    let describe = |dir: &Path| {
        match start.filter(|files| files.tokenizer.is_some()) {
            Some(files) => copy(files, dir)?,
            None => describe(recipe, vocabulary, dir)?,
        }
        // The model answers in the template that it has learned to answer in.
        if let Some(crate::sft::Template::File(path)) = &recipe.data.chat_template {
            let source = fs::read(path).map_err(Error::io(path))?;
            write_atomic(&dir.join("chat_template.jinja"), &source)?;
        }
        Ok::<_, Error>(())
    };
    let latent = recipe.output.dir.join("latent");
    fs::create_dir_all(&latent).map_err(Error::io(&latent))?;
    let weights = fs::read(best).map_err(Error::io(best))?;
    write_atomic(&latent.join("model.safetensors"), &weights)?;
    let json = format!("{:#}\n", config.to_json());
    write_atomic(&latent.join("config.json"), json.as_bytes())?;
    describe(&latent)?;
    if config.quantization.is_some_and(|q| q.scheme.weights != WeightKind::Full) {
        let packed = recipe.output.dir.join("packed");
        let checkpoint = Checkpoint::open(&[latent.join("model.safetensors")])?;
        convert(config, &checkpoint, &packed, Target::Packed, |_, _| ())?;
        describe(&packed)?;
    }
    Ok(())
}

/// Writes `adapter/` into the output folder of `recipe`, with the weights in the file `best`.
pub(super) fn export_adapter(recipe: &Recipe, lora: &Lora, best: &Path) -> Result<()> {
    let base = recipe.init.as_ref().map(|init| init.model.clone());
    let config = lora.adapter_config(base)?;
    let adapter = lora::adapter(&config, &Checkpoint::open(&[best.to_owned()])?)?;
    Ok(adapter.save(&recipe.output.dir.join(ADAPTER))?)
}

/// Tokenizer and generation settings of a model trained from scratch.
fn describe(recipe: &Recipe, vocabulary: &Vocabulary, dir: &Path) -> Result<()> {
    // Small models repeat themselves: of 60 stories of the default model 22 come back to the same five
    // words without the penalty, none with it.
    let generation = GenerationConfig {
        do_sample: Some(true),
        temperature: Some(0.6),
        top_p: Some(0.9),
        repetition_penalty: Some(1.2),
        bos_token_id: Some(vocabulary.bos()),
        eos_token_ids: [Some(vocabulary.eos()), vocabulary.eot()].into_iter().flatten().collect(),
        max_length: Some(recipe.model.max_position_embeddings),
        ..GenerationConfig::default()
    };
    vocabulary.save(dir)?;
    let json = format!("{:#}\n", generation.to_json());
    Ok(write_atomic(&dir.join("generation_config.json"), json.as_bytes())?)
}

/// Tokenizer and generation settings of the checkpoint that was trained on.
fn copy(files: &ModelFiles, dir: &Path) -> Result<()> {
    for path in files.companions() {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        write_atomic(&dir.join(path.file_name().unwrap_or_default()), &bytes)?;
    }
    Ok(())
}
