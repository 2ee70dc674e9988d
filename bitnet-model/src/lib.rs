//! BitNet b1.58 language models on [Candle](candle_core): from the Hub to tokens.
//!
//! ```text
//! hub → checkpoint → weights → model → session → sampler → text
//! ```
//!
//! [`pretrained::Pretrained`] opens a model by name, [`session::Session`] continues a prompt, [`score`]
//! tells how likely a text is, [`model::Model`] is the network itself. Every projection of the network
//! comes from a [`nn::LinearFactory`]: packed inference ([`nn::BitLinears`]), full precision
//! ([`nn::DenseLinears`]), and whatever another crate brings.
//!
//! ```
//! use bitnet_model::{pretrained::Pretrained, score::{ScoreRequest, loglikelihood}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let bitnet = Pretrained::open("default")?;
//! let tokenizer = bitnet.tokenizer.ok_or("the model has no tokenizer")?;
//! let score = |continuation: &str| -> Result<f64, Box<dyn std::error::Error>> {
//!     let context = tokenizer.encode("Once upon a", true)?;
//!     let continuation = tokenizer.encode(continuation, false)?;
//!     let scores = loglikelihood(&bitnet.model, &[ScoreRequest { context, continuation }], 1)?;
//!     Ok(scores[0].sum())
//! };
//! assert!(score(" time")? > score(" stone")?);
//! # Ok(())
//! # }
//! ```
pub mod activations;
pub mod adapter;
pub mod batch;
pub mod calibration;
pub mod checkpoint;
pub mod choices;
pub mod config;
pub mod cuda;
mod error;
pub mod fingerprint;
pub mod grammar;
pub mod head_weights;
pub mod hub;
mod isolated;
pub mod kernels;
pub mod kv_cache;
pub mod metal;
pub mod model;
pub mod nn;
pub mod ops;
pub mod packed;
pub mod pages;
pub mod perplexity;
pub mod pretrained;
pub mod quant;
pub mod rows;
pub mod sampler;
pub mod score;
pub mod session;
pub mod speculative;
pub mod storage;
pub mod synthetic;
pub mod text;
pub mod threads;
pub mod weights;

pub use error::{Error, Result};

/// The README's example is compiled and run with the documentation.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub struct Readme;
