//! A recipe carried out: dataset, model, training, and what is left behind for the Hub.
//!
//! The output folder ends with `latent/` (the best f32 masters, in the layout of 2B-4T-bf16, or of a
//! plain model for the full-precision twin) and, unless weights stay unquantized, `packed/` (2-bit codes); both
//! with tokenizer and generation settings, both load in transformers and here. What goes on from a Llama keeps Llama's
//! layout. A run with `[lora]` leaves `adapter/` instead, the best one so far, in PEFT's format. Quantizers other than b1.58's are told in `quantization_config` by keys that only this project honours.

use std::{
    ops::ControlFlow,
    sync::atomic::{AtomicBool, Ordering},
};

use bitnet_model::{config::Config, hub::Hub};
use candle_core::Device;

use crate::{
    Error, Result,
    checkpoint::Best,
    dataset::{Dataset, Vocabulary},
    distributed::{Communicator, Single, rank_zero_first},
    init::Start,
    metrics,
    recipe::{Recipe, Weights},
    trainer::{Event, Outcome, Trainer},
};

mod export;
mod network;

use network::Network;

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

/// Who computes a run, and where.
#[derive(Debug)]
pub struct Place {
    /// The job that this process is a rank of.
    pub communicator: Box<dyn Communicator>,
    /// The device that it computes on; of several ranks the processor.
    pub device: Device,
}

impl Default for Place {
    /// One process on the processor.
    fn default() -> Self {
        Self { communicator: Box::new(Single::default()), device: Device::Cpu }
    }
}

impl Place {
    /// Refuses what a device does not train, before anything is read.
    fn check(&self, recipe: &Recipe) -> Result<()> {
        if self.device.is_cpu() {
            return Ok(());
        }
        let ranks = self.communicator.size();
        if ranks > 1 {
            return Err(Error::Input(format!(
                "{ranks} processes train on `cpu` only so far: start one, or leave out --device"
            )));
        }
        if recipe.quantization.weights == Weights::Sign {
            return Err(Error::Input(
                "quantization.weights = \"sign\" is trained on `cpu` only so far: leave out --device".into(),
            ));
        }
        Ok(())
    }
}

/// [`run_as`] in a process of its own on the processor.
///
/// # Errors
/// Those of [`run_as`].
pub fn run(
    recipe: &Recipe,
    resume: bool,
    observe: &mut dyn FnMut(Event),
    interrupted: &AtomicBool,
) -> Result<Summary> {
    run_as(Place::default(), recipe, resume, observe, interrupted)
}

/// Trains `recipe`, as the rank of a job and on the device that `place` is, to its end, or until `interrupted` is set. With
/// `resume`, from the newest checkpoint in its output folder, which may come from another device.
///
/// # Errors
/// What the device does not compute. [`Error::Interrupted`] before there was anything to save; a recipe whose files cannot be
/// read or whose output folder holds another run; a loss that is no number, with the last good checkpoint; a rank that is gone
/// or has other weights.
pub fn run_as(
    place: Place,
    recipe: &Recipe,
    resume: bool,
    observe: &mut dyn FnMut(Event),
    interrupted: &AtomicBool,
) -> Result<Summary> {
    place.check(recipe)?;
    let Place { mut communicator, device } = place;
    let is_first = communicator.rank() == 0;
    let mut observe_data = |progress| {
        observe(Event::Data(progress));
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    // Rank 0 encodes the text; the others find it done.
    let dataset = rank_zero_first(&mut *communicator, || {
        Dataset::open_with(recipe, &Hub::from_env(), &mut observe_data)
    })?;
    if let Some(report) = &dataset.report {
        observe(Event::Records(report));
    }
    let vocabulary = dataset.vocabulary.clone();
    let network = Network::new(recipe, &vocabulary, communicator.rank(), &device)?;
    let named = network.parameters.named();
    let mut trainer = Trainer::open(recipe, dataset, named, resume, communicator)?;
    if trainer.state().step > 0 {
        // What the weights of the loss follow from; the trainer has dropped later lines.
        network.balance.replay(&metrics::read(&recipe.output.dir.join("metrics.jsonl"))?);
    }
    // An adapter is small: the best one so far is there to be used while the run goes on.
    let (best, mut exported) = (trainer.best(), Ok(()));
    let mut observe = |event: Event| {
        let is_best = matches!(event, Event::Evaluation { is_best: true, .. });
        observe(event);
        if let (true, true, Some(lora)) = (is_first, is_best, &recipe.lora)
            && exported.is_ok()
        {
            exported = export::export_adapter(recipe, lora, &best);
        }
    };
    let outcome = trainer.run(&*network.task, &mut observe, interrupted)?;
    exported?;
    if is_first && outcome != Outcome::Interrupted && trainer.state().best.is_some() {
        match &recipe.lora {
            Some(lora) => export::export_adapter(recipe, lora, &best)?,
            None => {
                let files = network.start.as_ref().and_then(Start::files);
                export::export(recipe, &network.config, &vocabulary, files, &best)?;
            }
        }
    }
    let (step, best) = (trainer.state().step, trainer.state().best);
    trainer.leave()?;
    Ok(Summary { outcome, step, best, parameters: network.parameters.count() })
}

/// The model that the recipe describes, with the special tokens of `vocabulary` where it has none of its own.
///
/// # Errors
/// A checkpoint to start from that cannot be opened or trained.
pub fn config(recipe: &Recipe, vocabulary: &Vocabulary) -> Result<Config> {
    if recipe.lora.is_some() {
        return Ok(network::base(recipe)?.config);
    }
    Ok(network::config(recipe, vocabulary, network::start(recipe)?.as_ref()))
}
