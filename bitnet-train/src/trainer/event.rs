//! What a run tells, and how it ends.

use std::{path::PathBuf, time::Duration};

use crate::{
    dataset::Progress,
    metrics::{EvaluationRecord, TrainRecord},
    samples::Sample,
    sft::Report,
};

/// What happens during a run, for a progress bar.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// Before the first update: text was read.
    Data(Progress),
    /// Before the first update: records became examples.
    Records(&'a Report),
    /// An update was made.
    Update {
        /// What is written to the metrics.
        record: &'a TrainRecord,
        /// Updates of the whole run.
        steps: usize,
        /// Time left at the speed of this process so far, evaluations and checkpoints included.
        eta: Duration,
    },
    /// An evaluation was made.
    Evaluation {
        /// What is written to the metrics.
        record: &'a EvaluationRecord,
        /// Whether it is the best so far, and its weights were written.
        is_best: bool,
    },
    /// The model was asked the prompts of `[samples]`.
    Samples(&'a [Sample]),
    /// A checkpoint was written.
    Saved(&'a PathBuf),
}

/// Why a run ended. Its last state is a checkpoint in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made.
    Finished,
    /// Held-out loss did not improve for `train.early_stop_patience` evaluations.
    EarlyStopped,
    /// The caller asked to stop; the run can be resumed.
    Interrupted,
}
