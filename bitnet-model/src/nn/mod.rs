//! Layers: each is its tensors, `new`, `load` and a `forward`. The path of a `VarBuilder` is the name
//! in the checkpoint; only [`Block`] reads the model's configuration.

mod attention;
mod bit_linear;
mod block;
mod feed_forward;
mod linear;
mod rms_norm;
mod rope;

pub use attention::Attention;
pub use bit_linear::{BitLinear, BitLinears};
pub use block::Block;
pub use feed_forward::FeedForward;
pub use linear::{DenseLinear, DenseLinears, LinearFactory, LinearSpec, Projection, Projections};
pub use rms_norm::RmsNorm;
pub use rope::{Angles, RotaryEmbedding};
