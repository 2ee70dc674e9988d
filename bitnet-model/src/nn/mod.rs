//! Layers: each is its tensors, `new`, `load` and a `forward`. The path of a `VarBuilder` is the name
//! in the checkpoint; only [`Block`] reads the model's configuration.

mod attention;
mod bit_linear;
mod block;
mod embedding;
mod feed_forward;
mod linear;
mod lm_head;
mod lora_linear;
mod rms_norm;
mod rope;
mod screened_head;
mod vocabulary;

pub use attention::{Attention, Context};
pub use bit_linear::{BitLinear, BitLinears};
pub use block::Block;
pub use embedding::{DenseEmbedding, Embedding, StoredEmbedding};
pub use feed_forward::FeedForward;
pub use linear::{DenseLinear, DenseLinears, LinearFactory, LinearSpec, Projection, Projections};
pub use lm_head::{
    Changed, HeadPrecision, LmHead, Logits, NEGLIGIBLE, Need, QuantizedHead, Rescored,
};
pub use lora_linear::LoraProjections;
pub use rms_norm::RmsNorm;
pub use rope::{Angles, RotaryEmbedding};
pub use screened_head::ScreenedHead;
pub use vocabulary::Vocabulary;

use candle_core::{Device, Result};

pub use crate::adapter::LowRank;
use crate::threads;

/// What `task` makes of each of `inputs`: side by side on the processor; one after the other on a device, whose kernels fill it.
fn map_on<I: Send, O: Send>(
    device: &Device,
    inputs: impl Iterator<Item = I>,
    task: impl Fn(I) -> Result<O> + Sync,
) -> Result<Vec<O>> {
    match device.is_cpu() {
        true => threads::map(inputs.collect(), task).into_iter().collect(),
        false => inputs.map(task).collect(),
    }
}
