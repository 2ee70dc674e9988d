//! Attention relations of MiniLMv2 (arXiv:2012.15828, §3), as BitDistill uses them (arXiv:2510.13998): how similar the
//! states of a sequence's positions are to one another, for queries, keys and values of one layer.
//!
//! The states are split to `heads` relation heads of size d, whose number has nothing to do with that of the attention
//! heads, so student and teacher may differ in width. `R = softmax(A·Aᵀ / √d)` for each head, and the loss is
//! `Σ KL(R_teacher ‖ R_student) / (heads · items)`, averaged over the three kinds of state. As in MiniLMv2 every
//! position is related to all positions of its sequence, later ones too: nothing is predicted here, so there is nothing
//! to hide. That holds for the documents of a packed sequence as well. Positions whose label is ignored have no row of
//! their own.

use candle_core::{D, Device, Tensor};

use super::{divergence::Divergence, tap::States};
use crate::{Error, Result};

/// The loss of `student` against `teacher`; `rows` marks the (batch · seq) positions that count, `items` are those of the
/// whole update. The processor computes it, of copies if the states are on a device.
///
/// # Errors
/// Widths that `heads` does not divide; sequences of different shape.
pub fn relations(
    student: &States,
    teacher: &States,
    heads: usize,
    rows: &[bool],
    items: usize,
) -> Result<Tensor> {
    let (mut total, device): (Option<Tensor>, _) = (None, student[0].device());
    for (student, teacher) in student.iter().zip(teacher) {
        let (student, teacher) =
            (&student.to_device(&Device::Cpu)?, &teacher.to_device(&Device::Cpu)?);
        let (batch, seq, _) = student.dims3()?;
        // (batch, heads, seq): the marks of a sequence, once a head.
        let marks = rows.chunks(seq.max(1)).take(batch);
        let marks: Vec<bool> = marks.flat_map(|row| row.repeat(heads)).collect();
        let of = Divergence {
            temperature: 1.,
            rows: marks.into(),
            divisor: 3. * heads as f64 * items.max(1) as f64,
        };
        let term = of.of(&similarities(student, heads)?, &similarities(teacher, heads)?)?;
        total = Some(match total {
            Some(total) => (total + term)?,
            None => term,
        });
    }
    let total = total.ok_or_else(|| Error::Input("relations of no states".into()))?;
    Ok(total.to_device(device)?)
}

/// `A·Aᵀ / √d` of every relation head: (batch, seq, width) → (batch · heads · seq, seq).
fn similarities(states: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, seq, width) = states.dims3()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        let reason = format!("{heads} heads do not divide states of {width} values");
        return Err(Error::recipe("distillation.relation_heads", reason));
    }
    let size = width / heads;
    let a = states.reshape((batch, seq, heads, size))?.transpose(1, 2)?.contiguous()?;
    let product = (a.matmul(&a.transpose(2, 3)?.contiguous()?)? * (size as f64).powf(-0.5))?;
    Ok(product.flatten_to(D::Minus2)?) // (batch, heads, seq, seq) → (batch · heads · seq, seq)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    fn states(widths: [usize; 3]) -> [Var; 3] {
        widths.map(|width| Var::randn(0f32, 1., (2, 5, width), &Device::Cpu).unwrap())
    }

    fn tensors(vars: &[Var; 3]) -> States {
        std::array::from_fn(|i| vars[i].as_tensor().clone())
    }

    /// One head and one position at a time.
    fn naive(student: &States, teacher: &States, heads: usize, rows: &[bool], items: f64) -> f64 {
        let softmax = |x: &Tensor, batch: usize, head: usize, position: usize| -> Vec<f64> {
            let x = x.to_vec3::<f32>().unwrap();
            let size = x[0][0].len() / heads;
            let part = |p: usize| &x[batch][p][head * size..][..size];
            let dot =
                |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let scores: Vec<f64> = (0..x[0].len())
                .map(|other| (dot(part(position), part(other)) / (size as f64).sqrt()).exp())
                .collect();
            let sum: f64 = scores.iter().sum();
            scores.iter().map(|score| score / sum).collect()
        };
        let mut total = 0.;
        for (s, t) in student.iter().zip(teacher) {
            for (index, _) in rows.iter().enumerate().filter(|(_, counts)| **counts) {
                for head in 0..heads {
                    let p = softmax(t, index / 5, head, index % 5);
                    let q = softmax(s, index / 5, head, index % 5);
                    total += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
                }
            }
        }
        total / (3. * heads as f64 * items)
    }

    #[test]
    fn equals_the_definition_and_reaches_all_states() {
        let (student, teacher) = (states([8, 4, 4]), states([16, 8, 8]));
        let rows: Vec<bool> = (0..10).map(|i| i != 4 && i != 9).collect();
        let (s, t) = (tensors(&student), tensors(&teacher));
        let loss = relations(&s, &t, 2, &rows, 16).unwrap();
        let wanted = naive(&s, &t, 2, &rows, 16.);
        let value = f64::from(loss.to_scalar::<f32>().unwrap());
        assert!((value - wanted).abs() < 1e-5 * wanted.max(1.), "{value} {wanted}");
        let grads = loss.backward().unwrap();
        for var in &student {
            let grad = grads.get(var).unwrap().abs().unwrap().sum_all().unwrap();
            assert!(grad.to_scalar::<f32>().unwrap() > 0.);
        }
        assert!(teacher.iter().all(|var| grads.get(var).is_none()));
        assert_eq!(relations(&t, &t, 4, &rows, 16).unwrap().to_scalar::<f32>().unwrap(), 0.);
    }

    #[test]
    fn heads_must_divide_the_states() {
        let (student, teacher) = (tensors(&states([8, 4, 4])), tensors(&states([8, 4, 4])));
        let message = relations(&student, &teacher, 3, &[true; 10], 1).unwrap_err().to_string();
        assert!(message.contains("relation_heads") && message.contains("8 values"), "{message}");
    }
}
