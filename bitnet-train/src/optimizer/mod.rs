//! From gradients to updated parameters: `clip` bounds their norm, `schedule` gives the step's learning rate and
//! decay, `adamw` updates.

pub mod adamw;
pub mod clip;
mod moments;
pub mod schedule;

pub use adamw::{AdamW, AdamWConfig, Decay, Update};
pub use clip::{clip_factor, global_norm};
pub use schedule::{Rates, Schedule, ScheduleKind};
