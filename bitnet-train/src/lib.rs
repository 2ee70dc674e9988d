//! Quantization-aware training of BitNet b1.58 language models.
//!
//! ```text
//! dataset → batch → model → loss → backward → optimizer → checkpoint → (packed) checkpoint
//! ```
//!
//! A run is described by a [`recipe::Recipe`]. [`dataset`] reads text and turns it into tokens, [`batch`] cuts them
//! into windows, [`language_model`] runs them forward and backward, with an [`objective`] made of [`loss`]es,
//! [`optimizer`] updates the parameters, [`metrics`] writes down what happened and [`checkpoint`] makes
//! it possible to stop and resume at any step with the same bits. [`trainer`] is that loop, over any [`task`].
//! [`eval`] asks a model the questions of well-known benchmarks.
//! [`lora`] trains an adapter beside a model that stays as it is, [`sft`] makes examples of instructions.
pub mod batch;
pub mod checkpoint;
pub mod codes;
pub mod dataset;
pub mod detector;
pub mod distill;
pub mod distributed;
mod error;
pub mod eval;
pub mod experiment;
mod fingerprint;
pub mod head_loss;
pub mod init;
pub mod language_model;
pub mod lora;
pub mod loss;
pub mod metrics;
pub mod objective;
pub mod optimizer;
pub mod parameters;
pub mod qat;
pub mod qat_matmul;
pub mod recipe;
pub mod samples;
pub mod sft;
pub mod task;
pub mod tensorboard;
pub mod trainer;
pub mod warmup;

pub use error::{Error, Result};
