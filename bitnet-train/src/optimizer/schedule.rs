//! Learning rate and weight decay as pure functions of the step.
//!
//! The default is the two-stage schedule of "The Era of 1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024):
//! linear decay from a high peak, at half of training a drop to the line of a lower peak, and weight decay in the
//! first half only. The drop lets ternary weights settle: with a high rate, latent weights keep crossing the
//! rounding thresholds.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Linear to zero from `peak_lr`, from half of the steps on from `second_peak_lr` and without weight decay.
    TwoStage,
    /// Half a cosine wave to zero.
    Cosine,
    /// Linear to zero.
    Linear,
    /// `peak_lr` throughout.
    Constant,
}

/// Learning rate and weight decay of a whole run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The shape after the warm-up.
    pub kind: ScheduleKind,
    /// Learning rate at the end of the warm-up.
    pub peak_lr: f64,
    /// The peak that the second stage's line starts from at step 0; used by [`ScheduleKind::TwoStage`] only.
    pub second_peak_lr: f64,
    /// Updates over which the rate rises linearly to its peak.
    pub warmup_steps: usize,
    /// Updates of the whole run.
    pub steps: usize,
    /// Decoupled weight decay (of the first stage, if there are two).
    pub weight_decay: f64,
}

/// What one update uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

impl Schedule {
    /// The rates of update `step`, counted from 0.
    pub fn at(&self, step: usize) -> Rates {
        let second_stage = self.kind == ScheduleKind::TwoStage && step >= self.steps / 2;
        let weight_decay = if second_stage { 0. } else { self.weight_decay };
        if step < self.warmup_steps {
            let lr = self.peak_lr * (step + 1) as f64 / self.warmup_steps as f64;
            return Rates { lr, weight_decay };
        }
        let decaying = self.steps.saturating_sub(self.warmup_steps).max(1);
        let done = ((step - self.warmup_steps) as f64 / decaying as f64).min(1.);
        let lr = match self.kind {
            ScheduleKind::TwoStage if second_stage => self.second_peak_lr * (1. - done),
            ScheduleKind::TwoStage | ScheduleKind::Linear => self.peak_lr * (1. - done),
            ScheduleKind::Cosine => self.peak_lr * 0.5 * (1. + (PI * done).cos()),
            ScheduleKind::Constant => self.peak_lr,
        };
        Rates { lr, weight_decay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> Schedule {
        Schedule {
            kind,
            peak_lr: 1.,
            second_peak_lr: 0.5,
            warmup_steps: 10,
            steps: 110,
            weight_decay: 0.1,
        }
    }

    fn assert_lr(kind: ScheduleKind, expected: &[(usize, f64)]) {
        for &(step, lr) in expected {
            let found = schedule(kind).at(step).lr;
            assert!((found - lr).abs() < 1e-12, "{kind:?} at {step}: {found}, expected {lr}");
        }
    }

    #[test]
    fn rates_are_as_documented() {
        assert_lr(
            ScheduleKind::TwoStage,
            &[(0, 0.1), (9, 1.), (10, 1.), (54, 0.56), (55, 0.275), (109, 0.005), (110, 0.)],
        );
        assert_lr(ScheduleKind::Linear, &[(4, 0.5), (10, 1.), (60, 0.5), (109, 0.01), (999, 0.)]);
        assert_lr(
            ScheduleKind::Cosine,
            &[(4, 0.5), (10, 1.), (35, 0.5 + 0.125f64.sqrt()), (60, 0.5), (110, 0.)],
        );
        assert_lr(ScheduleKind::Constant, &[(0, 0.1), (10, 1.), (109, 1.)]);
    }

    #[test]
    fn decay_ends_with_the_first_stage() {
        let decay = |kind, step| schedule(kind).at(step).weight_decay;
        assert_eq!(
            [0, 54, 55, 109].map(|step| decay(ScheduleKind::TwoStage, step)),
            [0.1, 0.1, 0., 0.]
        );
        assert_eq!([0, 109].map(|step| decay(ScheduleKind::Cosine, step)), [0.1, 0.1]);
    }

    #[test]
    fn degenerate_lengths_are_finite() {
        for (warmup_steps, steps) in [(0, 0), (0, 1), (5, 5), (9, 3)] {
            let schedule = Schedule { warmup_steps, steps, ..schedule(ScheduleKind::TwoStage) };
            for step in 0..12 {
                let lr = schedule.at(step).lr;
                assert!((0. ..=1.).contains(&lr), "{lr}");
            }
        }
    }
}
