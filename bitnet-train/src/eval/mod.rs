//! Evaluation on well-known benchmarks, as lm-evaluation-harness 0.4.13 does it.
//!
//! ```text
//! records → documents → prompts → requests → (responses) → values → metrics
//! ```
//!
//! A [`Task`] turns the records of a data file into [`Document`]s. [`few_shot`] puts examples before each, [`request`] makes
//! of that what a model is asked, whose [`Response`]s a task [judges](Task::values), and [`metric`] aggregates the values;
//! [`paired`] compares those of two models.
//! Nothing here runs a model.

pub mod data;
pub mod document;
pub mod few_shot;
pub mod formula;
pub mod metric;
pub mod paired;
pub mod python_random;
pub mod records;
pub mod request;
pub mod tasks;

pub use document::{Ask, Document};
pub use metric::{Aggregation, Metric, Sample};
pub use paired::Paired;
pub use request::{Request, Response};
pub use tasks::{Examples, TASKS, Task};
