//! Distillation: a student learns to say what a teacher says, beside what the text says.
//!
//! - [`divergence`]: the teacher's logits, softened by a temperature (arXiv:1503.02531);
//! - [`relations`]: how its positions relate to one another in one layer (MiniLMv2, BitDistill);
//! - [`tap`]: how the states of that layer are got at, without a change of the model;
//! - [`balance`]: how the terms are weighted.

use std::cell::RefCell;

use bitnet_model::{
    hub::Hub,
    model::Model,
    nn::{BitLinears, DenseLinears, LinearFactory},
    pretrained::{Precision, Source},
};
use candle_core::{D, Device, Tensor};

use crate::{
    Error, Result,
    batch::Batch,
    loss::{IGNORED, cross_entropy},
    objective::{CROSS_ENTROPY, Objective, Output, Term},
    recipe,
};

pub mod balance;
pub mod divergence;
pub mod relations;
pub mod tap;

use balance::Balance;
use divergence::Divergence;
use tap::{States, Tap, Tapped};

/// The name of the logits' term in the metrics.
pub const LOGITS: &str = "logits_divergence";
/// The name of the attention relations' term in the metrics.
pub const RELATIONS: &str = "attention_relations";

/// A model that is learnt from: frozen, in whatever form this project loads.
pub struct Teacher {
    model: Model,
    layer: usize,
    tap: Tap,
}

impl Teacher {
    /// Opens `source`, a folder, a file or a Hub repo id. Float weights without a `quantization_config` run as they are.
    /// Of its blocks the one as far up is tapped as block `layer` of a student of `layers` blocks. It computes on `device`.
    ///
    /// # Errors
    /// A model that cannot be loaded.
    pub fn open(source: &str, (layer, layers): (usize, usize), device: &Device) -> Result<Self> {
        let source = Source::open(source, Precision::AsFound, &Hub::from_env())?;
        let layer = corresponding(layer, layers, source.config.num_hidden_layers);
        let packed = source.config.quantization.map(BitLinears::new);
        let linears: &dyn LinearFactory = match &packed {
            Some(packed) => packed,
            None => &DenseLinears,
        };
        let tap = Tap::default();
        let tapped = Tapped::new(linears, layer, tap.clone());
        Ok(Self { model: source.load_with(&tapped, device)?, layer, tap })
    }

    /// The network.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The block whose states are looked at.
    pub fn layer(&self) -> usize {
        self.layer
    }
}

/// The block of `to` that is as far up as block `layer` of `from`: the last for the last.
fn corresponding(layer: usize, from: usize, to: usize) -> usize {
    ((layer + 1) * to).div_ceil(from.max(1)).clamp(1, to.max(1)) - 1
}

/// What the teacher made of the current batch.
struct Lesson {
    /// (batch · seq, vocab)
    logits: Tensor,
    states: States,
}

/// Cross-entropy, the teacher's logits and the teacher's attention relations, weighted by a [`Balance`].
pub struct Distillation {
    teacher: Teacher,
    settings: recipe::Distillation,
    /// The student's block that is tapped, and where.
    layer: usize,
    tap: Tap,
    heads: usize,
    balance: Balance,
    lesson: RefCell<Option<Lesson>>,
}

impl Distillation {
    /// `tap` is at block `layer` of the student, whose configuration is `student`.
    ///
    /// # Errors
    /// A teacher with another vocabulary, or widths that the relation heads do not divide.
    pub fn new(
        teacher: Teacher,
        settings: &recipe::Distillation,
        student: &bitnet_model::config::Config,
        (layer, tap): (usize, Tap),
        balance: Balance,
    ) -> Result<Self> {
        let theirs = teacher.model.config();
        if theirs.vocab_size != student.vocab_size {
            let reason = format!(
                "its vocabulary of {} is not the student's of {}: distillation compares token by token, so both need \
                 the same tokenizer",
                theirs.vocab_size, student.vocab_size
            );
            return Err(Error::recipe("distillation.teacher", reason));
        }
        let heads = settings.relation_heads.unwrap_or(student.num_key_value_heads);
        if settings.attention_weight > 0. {
            for config in [student, theirs] {
                let query = config.num_attention_heads * config.head_dim;
                let key_value = config.num_key_value_heads * config.head_dim;
                if !query.is_multiple_of(heads) || !key_value.is_multiple_of(heads) {
                    let reason = format!(
                        "{heads} do not divide queries of {query} and keys of {key_value} values; give a number that \
                         does, for student and teacher"
                    );
                    return Err(Error::recipe("distillation.relation_heads", reason));
                }
            }
        }
        let (settings, lesson) = (settings.clone(), RefCell::default());
        Ok(Self { teacher, settings, layer, tap, heads, balance, lesson })
    }
}

fn counted(batch: &Batch) -> Vec<bool> {
    batch.labels.iter().map(|&label| label != IGNORED).collect()
}

fn no_lesson() -> Error {
    Error::Input("the teacher has not seen this batch".into())
}

impl Objective for Distillation {
    fn prepare(&self, batch: &Batch) -> Result<()> {
        let model = &self.teacher.model;
        let shape = (batch.rows(), batch.sequence_length);
        let tokens = Tensor::from_slice(&batch.inputs, shape, model.device())?;
        let hidden = model.document_states(&tokens, &batch.starts)?;
        let logits = model.logits(&hidden)?.flatten_to(D::Minus2)?;
        let states = self.teacher.tap.take()?;
        *self.lesson.borrow_mut() = Some(Lesson { logits, states });
        Ok(())
    }

    fn of_output(&self, output: Output<'_>) -> Result<Vec<Term>> {
        let Output { model, hidden, batch, items } = output;
        let logits = model.logits(hidden)?.flatten_to(D::Minus2)?; // (batch · seq, vocab)
        let value = cross_entropy(&logits, &batch.labels, Some(items))?;
        let mut terms = vec![Term { name: CROSS_ENTROPY, value, weight: 1. }];
        if self.settings.logits_weight > 0. {
            let lesson = self.lesson.borrow();
            let lesson = lesson.as_ref().ok_or_else(no_lesson)?;
            let of = Divergence {
                temperature: self.settings.temperature as f32,
                rows: counted(batch).into(),
                divisor: items.max(1) as f64,
            };
            let value = of.of(&logits, &lesson.logits)?;
            let weight = self.balance.weight(LOGITS, self.settings.logits_weight);
            terms.push(Term { name: LOGITS, value, weight });
        }
        Ok(terms)
    }

    fn of_block(&self, layer: usize, batch: &Batch, items: usize) -> Result<Vec<Term>> {
        if layer != self.layer || self.settings.attention_weight == 0. {
            return Ok(Vec::new());
        }
        let lesson = self.lesson.borrow();
        let lesson = lesson.as_ref().ok_or_else(no_lesson)?;
        let student = self.tap.take()?;
        let rows = counted(batch);
        let value = relations::relations(&student, &lesson.states, self.heads, &rows, items)?;
        let weight = self.balance.weight(RELATIONS, self.settings.attention_weight);
        Ok(vec![Term { name: RELATIONS, value, weight }])
    }
}

#[cfg(test)]
mod tests {
    use super::corresponding;

    #[test]
    fn layers_correspond_by_height() {
        assert_eq!([0, 2, 4].map(|layer| corresponding(layer, 5, 5)), [0, 2, 4]);
        assert_eq!([0, 1, 2].map(|layer| corresponding(layer, 3, 12)), [3, 7, 11]);
        assert_eq!([0, 5, 11].map(|layer| corresponding(layer, 12, 3)), [0, 1, 2]);
    }
}
