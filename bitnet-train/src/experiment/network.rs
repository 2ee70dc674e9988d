//! The model that a recipe describes: its configuration, its variables and where they start.

use std::sync::Arc;

use bitnet_model::{
    config::{Activation, Config, Family, Quantization, WeightForm},
    hub::Hub,
    model::Model,
    nn::{DenseLinears, LinearFactory},
    pretrained::{self, Source},
    quant::Rounding,
};
use candle_core::Device;

use crate::{
    Error, Result,
    dataset::Vocabulary,
    distill::{
        Distillation, Teacher,
        balance::{Balance, Balanced, Balancing},
        tap::{Tap, Tapped},
    },
    init::Start,
    language_model::{EmbeddingNoise, LanguageModel},
    lora::{LoraModel, LoraTask, Training},
    objective::{NextToken, Objective},
    parameters::Parameters,
    qat::QatLinears,
    recipe::{Lora, Precision, Recipe},
    samples::Prompts,
    task::Task,
    warmup::{Lambda, Warmup},
};

/// A network that is trained, with its objective.
pub(super) struct Network {
    pub config: Config,
    pub start: Option<Start>,
    pub parameters: Arc<Parameters>,
    pub balance: Balance,
    pub task: Box<dyn Task>,
}

impl Network {
    /// Builds all that `recipe` says: quantizers, first weights, λ and, if there is a teacher, distillation.
    /// With `[lora]` an adapter beside that checkpoint. `rank` is that of this process in a job; the network is on `device`.
    pub fn new(
        recipe: &Recipe,
        vocabulary: &Vocabulary,
        rank: usize,
        device: &Device,
    ) -> Result<Self> {
        if let Some(lora) = &recipe.lora {
            return Self::adapter(recipe, lora, rank, device);
        }
        let start = start(recipe)?;
        let config = config(recipe, vocabulary, start.as_ref());
        let backward = recipe.train.backward.into();
        let lambda = Lambda::default();
        let qat = QatLinears::new(Rounding::HalfEven)
            .with_scheme(recipe.quantization.scheme())
            .with_backward(backward)
            .with_lambda(lambda.clone());
        let linears: &dyn LinearFactory = match recipe.model.precision {
            Precision::Bitnet => &qat,
            Precision::Full => &DenseLinears,
        };
        let parameters = Parameters::on(device, recipe.train.seed);
        let layers = config.num_hidden_layers;
        let distillation = recipe.distillation.as_ref();
        let tap = Tap::default();
        let model = match distillation.filter(|settings| settings.attention_weight > 0.) {
            Some(settings) => {
                let tapped = Tapped::new(linears, settings.layer(layers), tap.clone());
                Model::load(&config, &tapped, parameters.var_builder())?
            }
            None => Model::load(&config, linears, parameters.var_builder())?,
        };
        let frozen = Model::load(&config, linears, parameters.frozen_builder())?;
        if let Some(start) = &start {
            start.load(&parameters)?;
        }
        let balance = Balance::new(distillation.map_or(Balancing::Manual, |d| d.balance));
        let objective: Box<dyn Objective> = match distillation {
            Some(settings) => {
                let layer = settings.layer(layers);
                let teacher = Teacher::open(&settings.teacher, (layer, layers), device)?;
                let tap = (layer, tap);
                Box::new(Distillation::new(teacher, settings, &config, tap, balance.clone())?)
            }
            None => Box::new(NextToken { precision: backward }),
        };
        let quantizer = match recipe.model.precision {
            Precision::Bitnet => recipe.quantization.scheme().weight(Rounding::HalfEven),
            Precision::Full => None,
        };
        let task = LanguageModel::new(model, frozen, objective)
            .backward(backward)
            .recompute(recipe.train.recompute_blocks)
            .quantizer(quantizer)
            .prompts(Prompts::open(recipe, &config)?);
        let task = Balanced::new(task, balance.clone());
        let task = Box::new(Warmup::new(task, recipe.quantization.lambda(), lambda));
        Ok(Self { config, start, parameters, balance, task })
    }

    /// An adapter beside the model of `[init]`.
    fn adapter(recipe: &Recipe, lora: &Lora, rank: usize, device: &Device) -> Result<Self> {
        let source = base(recipe)?;
        let settings = lora.adapter_config(Some(source.name.clone()))?;
        let precision = recipe.train.backward.into();
        let training = Training {
            mode: lora.mode,
            seed: recipe.train.seed,
            backward: precision,
            keep_bytes: lora.keep_mib.saturating_mul(1 << 20),
        };
        let LoraModel { trained, frozen, parameters, step } =
            LoraModel::load(&source, &settings, training, device)?;
        let config = source.config.clone();
        let noise = lora.neftune_alpha.map(|alpha| EmbeddingNoise { alpha, step: step.clone() });
        let task = LanguageModel::new(trained, frozen, Box::new(NextToken { precision }))
            .backward(precision)
            .recompute(recipe.train.recompute_blocks)
            .noise(noise)
            .prompts(Prompts::open(recipe, &config)?);
        let task = Box::new(LoraTask::new(task, step, rank));
        let balance = Balance::new(Balancing::Manual);
        Ok(Self { config, start: None, parameters, balance, task })
    }
}

/// The checkpoint that `recipe` starts from, if it names one whose weights are trained.
pub(super) fn start(recipe: &Recipe) -> Result<Option<Start>> {
    if recipe.lora.is_some() {
        return Ok(None);
    }
    let scheme = match recipe.model.precision {
        Precision::Bitnet => Some(recipe.quantization.scheme()),
        Precision::Full => None,
    };
    recipe.init.as_ref().map(|init| Start::open(init, scheme)).transpose()
}

/// The model that an adapter of `recipe` stands beside.
pub(super) fn base(recipe: &Recipe) -> Result<Source> {
    let Some(init) = &recipe.init else {
        return Err(Error::recipe("init.model", "an adapter needs a model to stand beside"));
    };
    Ok(Source::open(&init.model, pretrained::Precision::AsFound, &Hub::from_env())?)
}

/// The configuration of the model that `recipe` describes; special tokens that `start` does not name are those of
/// `vocabulary`.
pub(super) fn config(recipe: &Recipe, vocabulary: &Vocabulary, start: Option<&Start>) -> Config {
    let mut config = match start {
        Some(start) => start.config().clone(),
        None => from_scratch(recipe),
    };
    config.bos_token_id = config.bos_token_id.or(Some(vocabulary.bos()));
    if config.eos_token_ids.is_empty() {
        config.eos_token_ids.push(vocabulary.eos());
    }
    config
}

/// A BitNet of the geometry of `[model]`, with online quantization unless it is the full-precision twin.
fn from_scratch(recipe: &Recipe) -> Config {
    let model = &recipe.model;
    let quantization = match model.precision {
        Precision::Bitnet => Some(Quantization {
            weights: WeightForm::Latent,
            rounding: Rounding::HalfEven,
            scheme: recipe.quantization.scheme(),
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
        head_dim: model.head_dim(),
        hidden_act: Activation::Relu2,
        rms_norm_eps: model.rms_norm_eps,
        rope_theta: model.rope_theta,
        max_position_embeddings: model.max_position_embeddings,
        tie_word_embeddings: model.tie_word_embeddings,
        attention_bias: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        quantization,
    }
}
