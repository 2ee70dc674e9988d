//! LoRA: low-rank adapters that are trained beside a frozen base (arXiv:2106.09685).
//!
//! The base stays packed. Its codes are decoded block by block where a gradient passes through them, embedding and head keep
//! the dtype of the checkpoint, and none of it is copied or gets a gradient. What is trained are the pairs `A` and `B` of the
//! chosen projections, f32, and, if asked for, whole norms, embedding or head. [`Mode::Qat`] trains the pairs inside the
//! quantizer of a latent master instead.

mod kept;
mod linears;
mod network;
mod noise;
mod product;
mod qat;
mod task;
mod whole;

pub use kept::Kept;
pub use linears::{Base, LoraLinears, LoraView};
pub(crate) use network::adapter;
pub use network::{LoraModel, Mode, Training};
pub use noise::{Step, Stream};
pub use product::{Pass, Product, TernaryBase, TrainedPair, low_rank};
pub use qat::{QatLoraLinears, QatLoraView};
pub use task::LoraTask;
pub use whole::{WholeTensors, check as check_whole_modules};
