//! x
pub mod qat;
pub mod parameters;
