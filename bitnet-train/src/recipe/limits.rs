//! `[train.limits]`: what counts as divergence and as vocabulary collapse.

use serde::{Deserialize, Serialize};

use super::validate::{at_least_one, positive};
use crate::{
    Result,
    detector::{CollapseLimits, DivergenceLimits},
};

/// The limits of the detectors, see [`crate::detector`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The loss may be higher than its lowest running median by this part of it.
    pub divergence_margin: f64,
    /// So many updates in a row above that are a divergence; fewer are a spike.
    pub divergence_updates: usize,
    /// So many evaluations in a row that predict few tokens, no better than by their frequencies, are a collapse.
    pub collapse_evaluations: usize,
    /// A model that has not yet learned more than frequencies is given so many updates after the warm-up to do it.
    pub collapse_after: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            divergence_margin: 0.3,
            divergence_updates: 50,
            collapse_evaluations: 3,
            collapse_after: 1000,
        }
    }
}

impl Limits {
    /// Says which value cannot be used.
    pub(super) fn validate(&self) -> Result<()> {
        positive("train.limits.divergence_margin", self.divergence_margin)?;
        at_least_one("train.limits.divergence_updates", self.divergence_updates)?;
        at_least_one("train.limits.collapse_evaluations", self.collapse_evaluations)
    }

    /// For [`crate::detector::Divergence`].
    pub fn divergence(&self) -> DivergenceLimits {
        DivergenceLimits { margin: self.divergence_margin, updates: self.divergence_updates }
    }

    /// For [`crate::detector::Collapse`].
    pub fn collapse(&self) -> CollapseLimits {
        CollapseLimits { evaluations: self.collapse_evaluations, after: self.collapse_after }
    }
}
