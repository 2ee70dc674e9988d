//! BitNet b1.58 language models on [Candle](candle_core): from the Hub to tokens.
//!
//! ```text
//! hub → checkpoint → weights → model → session → sampler → text
//! ```
pub mod checkpoint;
pub mod config;
mod error;
pub mod hub;
pub mod kernels;
pub mod kv_cache;
pub mod model;
pub mod nn;
pub mod ops;
pub mod pretrained;
pub mod quant;
pub mod sampler;
pub mod score;
pub mod session;
pub mod storage;
pub mod text;
pub mod weights;

pub use error::{Error, Result};
