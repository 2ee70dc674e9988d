//! Evaluation on well-known benchmarks, as lm-evaluation-harness 0.4.13 does it.
//!
//! ```text
//! records → documents → prompts → requests → (responses) → values → metrics
//! ```
//!
//! A [`Task`] turns the records of a data file into [`Document`]s. [`few_shot`] puts examples before each, [`request`] makes
//! of that what a model is asked, whose [`Response`]s a task [judges](Task::values), and [`metric`] aggregates the values.
//! Nothing here runs a model.

pub mod document;
pub mod few_shot;
pub mod metric;
pub mod python_random;
pub mod records;
pub mod request;
pub mod tasks;

pub use document::{Ask, Document};
pub use metric::{Aggregation, Metric, Sample};
pub use request::{Request, Response};
pub use tasks::{Examples, TASKS, Task};
