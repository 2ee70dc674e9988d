//! λ warm-up: quantization that comes in by degrees, `x + λ·(q(x) − x)`, for weights and activations alike.
//!
//! λ is a function of the step alone, so a resumed run goes on with the same bits. Its value is shared by all layers
//! through [`Lambda`], which [`Warmup`] sets before every update.

use std::{
    f64::consts::PI,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use serde::{Deserialize, Serialize};

use crate::{
    Result,
    batch::Batch,
    samples::Sample,
    task::{Gradients, Part, Prediction, Task},
};

/// How λ rises from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LambdaShape {
    /// `t`: the best of those compared by the authors of HF1BitLLM's models.
    #[default]
    Linear,
    /// `1 / (1 + e^(−12·(t − ½)))`, stretched to run from 0 to 1: late, and then at once.
    Sigmoid,
    /// `(e^(5t) − 1) / (e⁵ − 1)`: most of it at the end.
    Exponential,
    /// `(1 − cos πt) / 2`: slow at both ends.
    Cosine,
    /// Four equal jumps, at quarters of the way; the last one at its end.
    Step,
}

impl LambdaShape {
    /// λ at `t` of the way, 0 to 1.
    fn at(self, t: f64) -> f64 {
        match self {
            Self::Linear => t,
            Self::Sigmoid => {
                let sigmoid = |t: f64| 1. / (1. + (-12. * (t - 0.5)).exp());
                (sigmoid(t) - sigmoid(0.)) / (sigmoid(1.) - sigmoid(0.))
            }
            Self::Exponential => ((5. * t).exp() - 1.) / (5f64.exp() - 1.),
            Self::Cosine => (1. - (PI * t).cos()) / 2.,
            Self::Step => (4. * t).floor() / 4.,
        }
    }
}

/// λ of every step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LambdaSchedule {
    /// How it rises.
    pub shape: LambdaShape,
    /// Updates until it is 1; 0 quantizes from the first one.
    pub steps: usize,
}

impl LambdaSchedule {
    /// λ of the update after `step` updates.
    pub fn at(&self, step: usize) -> f32 {
        if step >= self.steps {
            return 1.;
        }
        self.shape.at(step as f64 / self.steps as f64) as f32
    }
}

/// One λ for many layers: a clone shares the value.
#[derive(Clone, Debug)]
pub struct Lambda(Arc<AtomicU32>);

impl Default for Lambda {
    fn default() -> Self {
        Self(Arc::new(AtomicU32::new(1f32.to_bits())))
    }
}

impl Lambda {
    /// Its value: 1 until it is set.
    pub fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Ordering::Relaxed))
    }

    /// Changes it for all who share it.
    pub fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Ordering::Relaxed);
    }
}

/// A task whose layers follow a [`LambdaSchedule`]. It evaluates with λ = 1: that is the model the run will end with.
pub struct Warmup<T> {
    task: T,
    schedule: LambdaSchedule,
    lambda: Lambda,
}

impl<T> Warmup<T> {
    /// `lambda` is the one that the layers of `task` were given, those that train and those that evaluate.
    pub fn new(task: T, schedule: LambdaSchedule, lambda: Lambda) -> Self {
        Self { task, schedule, lambda }
    }
}

impl<T: Task> Task for Warmup<T> {
    fn inner(&self) -> Option<&dyn Task> {
        Some(&self.task)
    }

    fn begin(&self, step: usize) -> Result<()> {
        self.lambda.set(self.schedule.at(step));
        self.task.begin(step)
    }

    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        self.task.pass(batch, items, gradients)
    }

    fn lambda(&self) -> Option<f64> {
        (self.schedule.steps > 0).then(|| self.lambda.get().into())
    }

    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        let lambda = self.lambda.get();
        self.lambda.set(1.);
        let predictions = self.task.evaluate(batch);
        self.lambda.set(lambda);
        predictions
    }

    fn samples(&self) -> Result<Vec<Sample>> {
        let lambda = self.lambda.get();
        self.lambda.set(1.);
        let samples = self.task.samples();
        self.lambda.set(lambda);
        samples
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [LambdaShape; 5] = [
        LambdaShape::Linear,
        LambdaShape::Sigmoid,
        LambdaShape::Exponential,
        LambdaShape::Cosine,
        LambdaShape::Step,
    ];

    #[test]
    fn every_shape_rises_from_nothing_to_one() {
        for shape in SHAPES {
            let schedule = LambdaSchedule { shape, steps: 40 };
            assert_eq!((schedule.at(0), schedule.at(40), schedule.at(1000)), (0., 1., 1.));
            let values: Vec<f32> = (0..=40).map(|step| schedule.at(step)).collect();
            assert!(values.is_sorted(), "{shape:?} {values:?}");
            assert!(values.iter().all(|value| (0. ..=1.).contains(value)));
            assert!((shape.at(1.) - 1.).abs() < 1e-12);
            assert_eq!(LambdaSchedule { shape, steps: 0 }.at(0), 1.);
        }
        let step = LambdaSchedule { shape: LambdaShape::Step, steps: 40 };
        assert_eq!([9, 10, 29, 39].map(|at| step.at(at)), [0., 0.25, 0.5, 0.75]);
    }

    #[test]
    fn clones_share_the_value() {
        let lambda = Lambda::default();
        assert_eq!(lambda.get(), 1.);
        lambda.clone().set(0.25);
        assert_eq!(lambda.get(), 0.25);
    }
}
