//! A recipe carried out: dataset, model, training, and what is left behind for the Hub.
//!
//! The output folder ends with `latent/` (the best f32 masters, in the layout of 2B-4T-bf16, or of a
//! plain model for the full-precision twin) and, for a BitNet, `packed/` (the layout of 2B-4T); both
//! with tokenizer and generation settings, both load in transformers and here.

use std::{fs, path::Path, sync::atomic::AtomicBool};

use crate::{
    Error, Result,
    checkpoint::Best,
    dataset::{Dataset, Vocabulary},
    distributed::{Communicator, Single},
    language_model::LanguageModel,
    objective::NextToken,
    parameters::Parameters,
    qat::QatLinears,
    recipe::{Precision, Recipe},
    trainer::{Event, Outcome, Trainer},
};
use bitnet_model::{
    checkpoint::{
        Checkpoint,
        export::{Target, convert},
        write_atomic,
    },
    config::{Activation, Config, Family, GenerationConfig, Quantization, WeightForm},
    model::Model,
    nn::{DenseLinears, LinearFactory},
    quant::{Rounding, Scheme},
};

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Why it ended.
    pub outcome: Outcome,
    /// Updates made.
    pub step: usize,
    /// The best evaluation; its weights were exported.
    pub best: Option<Best>,
    /// Number of trainable values.
    pub parameters: usize,
}

/// [`run_as`] in a process of its own.
///
/// # Errors
/// Those of [`run_as`].
pub fn run(
    recipe: &Recipe,
    resume: bool,
    observe: &mut dyn FnMut(Event),
    interrupted: &AtomicBool,
) -> Result<Summary> {
    run_as(Box::new(Single::default()), recipe, resume, observe, interrupted)
}

/// Trains `recipe`, as the rank of a job that `communicator` is, to its end, or until `interrupted` is set. With `resume`, from the newest checkpoint
/// in its output folder.
///
/// # Errors
/// A recipe whose files cannot be read or whose output folder holds another run; a loss that is no
/// number, with the last good checkpoint; a rank that is gone or has other weights.
pub fn run_as(
    communicator: Box<dyn Communicator>,
    recipe: &Recipe,
    resume: bool,
    observe: &mut dyn FnMut(Event),
    interrupted: &AtomicBool,
) -> Result<Summary> {
    let is_first = communicator.rank() == 0;
    let dataset = Dataset::open(recipe)?;
    let vocabulary = dataset.vocabulary.clone();
    let config = config(recipe, &vocabulary);
    let qat = QatLinears::new(Rounding::HalfEven).with_backward(recipe.train.backward.into());
    let linears: &dyn LinearFactory = match recipe.model.precision {
        Precision::Bitnet => &qat,
        Precision::Full => &DenseLinears,
    };
    let parameters = Parameters::new(recipe.train.seed);
    let model = Model::load(&config, linears, parameters.var_builder())?;
    let frozen = Model::load(&config, linears, parameters.frozen_builder())?;
    let named = parameters.named();
    let mut trainer = Trainer::open(recipe, dataset, named, resume, communicator)?;
    let task = LanguageModel::new(model, frozen, Box::new(NextToken))
        .recompute(recipe.train.recompute_blocks);
    let outcome = trainer.run(&task, observe, interrupted)?;
    if is_first && outcome != Outcome::Interrupted && trainer.state().best.is_some() {
        export(recipe, &config, &vocabulary, &trainer.best())?;
    }
    let (step, best) = (trainer.state().step, trainer.state().best);
    trainer.leave()?;
    Ok(Summary { outcome, step, best, parameters: parameters.count() })
}

/// The model that the recipe describes, with the special tokens of `vocabulary`; online quantization unless it is the full-precision twin.
pub fn config(recipe: &Recipe, vocabulary: &Vocabulary) -> Config {
    let model = &recipe.model;
    let quantization = match model.precision {
        Precision::Bitnet => Some(Quantization {
            weights: WeightForm::Latent,
            rounding: Rounding::HalfEven,
            scheme: Scheme::default(),
            input_norm_eps: None,
        }),
        Precision::Full => None,
    };
    Config {
        family: Family::BitNet,
        vocab_size: model.vocab_size,
        hidden_size: model.hidden_size,
        intermediate_size: model.intermediate_size,
        num_hidden_layers: model.num_hidden_layers,
        num_attention_heads: model.num_attention_heads,
        num_key_value_heads: model.num_key_value_heads,
        head_dim: model.hidden_size / model.num_attention_heads,
        hidden_act: Activation::Relu2,
        rms_norm_eps: model.rms_norm_eps,
        rope_theta: model.rope_theta,
        max_position_embeddings: model.max_position_embeddings,
        tie_word_embeddings: model.tie_word_embeddings,
        attention_bias: false,
        bos_token_id: Some(vocabulary.bos()),
        eos_token_ids: vec![vocabulary.eos()],
        quantization,
    }
}

fn export(recipe: &Recipe, config: &Config, vocabulary: &Vocabulary, best: &Path) -> Result<()> {
    let latent = recipe.output.dir.join("latent");
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
    let describe = |dir: &Path| -> Result<()> {
        vocabulary.save(dir)?;
        let json = format!("{:#}\n", generation.to_json());
        Ok(write_atomic(&dir.join("generation_config.json"), json.as_bytes())?)
    };
    fs::create_dir_all(&latent).map_err(Error::io(&latent))?;
    let weights = fs::read(best).map_err(Error::io(best))?;
    write_atomic(&latent.join("model.safetensors"), &weights)?;
    let json = format!("{:#}\n", config.to_json());
    write_atomic(&latent.join("config.json"), json.as_bytes())?;
    describe(&latent)?;
    if config.quantization.is_some() {
        let packed = recipe.output.dir.join("packed");
        let checkpoint = Checkpoint::open(&[latent.join("model.safetensors")])?;
        convert(config, &checkpoint, &packed, Target::Packed, |_, _| ())?;
        describe(&packed)?;
    }
    Ok(())
}
