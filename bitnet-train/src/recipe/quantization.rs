//! `[quantization]`: which quantizers, and how they come in.

use bitnet_model::quant::{InputKind, InputWidth, Scheme, WeightKind};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    warmup::{LambdaSchedule, LambdaShape},
};

/// `[quantization]`: by default b1.58 from the first update on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Quantization {
    /// `absmean` (b1.58), `sign` (the first BitNet) or `none`.
    pub weights: Weights,
    /// `int8`, `int4` or `none`.
    pub activations: Activations,
    /// The input of `o_proj`, if it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub o_proj_activations: Option<Activations>,
    /// The input of `down_proj`, if it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub down_proj_activations: Option<Activations>,
    /// The projections whose input is rotated by a Hadamard transform first.
    pub hadamard: Vec<Rotated>,
    /// Updates over which quantization comes in; 0: all at once.
    pub lambda_steps: usize,
    /// How it comes in.
    pub lambda_schedule: LambdaShape,
}

/// What weights become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    /// −1, 0, 1 by absolute mean.
    #[default]
    Absmean,
    /// −1, 1 by sign.
    Sign,
    /// They stay as they are.
    None,
}

/// What activations become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// 8 bits by absolute maximum.
    #[default]
    Int8,
    /// 4 bits by absolute maximum.
    Int4,
    /// They stay as they are.
    None,
}

/// A projection whose input may be rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotated {
    /// `o_proj`
    OProj,
    /// `down_proj`
    DownProj,
}

impl From<Activations> for InputWidth {
    fn from(activations: Activations) -> Self {
        match activations {
            Activations::Int8 => Self::Int8,
            Activations::Int4 => Self::Int4,
            Activations::None => Self::Full,
        }
    }
}

impl Quantization {
    /// The quantizers of every projection.
    pub fn scheme(&self) -> Scheme {
        let weights = match self.weights {
            Weights::Absmean => WeightKind::Absmean,
            Weights::Sign => WeightKind::Sign,
            Weights::None => WeightKind::Full,
        };
        let input = |width: Option<Activations>, rotated| InputKind {
            width: width.unwrap_or(self.activations).into(),
            hadamard: self.hadamard.contains(&rotated),
        };
        Scheme {
            weights,
            stream: InputKind { width: self.activations.into(), hadamard: false },
            o_proj: input(self.o_proj_activations, Rotated::OProj),
            down_proj: input(self.down_proj_activations, Rotated::DownProj),
        }
    }

    /// How quantization comes in.
    pub fn lambda(&self) -> LambdaSchedule {
        LambdaSchedule { shape: self.lambda_schedule, steps: self.lambda_steps }
    }

    /// Checks the values; `is_full` says that the model is the full-precision twin.
    pub(super) fn validate(&self, is_full: bool) -> Result<()> {
        if is_full && *self != Self::default() {
            let reason =
                "says how to quantize, but `model.precision` is full; leave one of them out";
            return Err(Error::recipe("quantization", reason));
        }
        let Scheme { weights, stream, o_proj, down_proj } = self.scheme();
        let inputs = [stream, o_proj, down_proj];
        if weights == WeightKind::Full && inputs.iter().all(|i| i.width == InputWidth::Full) {
            let reason = "is none, and so are all activations: for a full-precision model set \
                          `model.precision = \"full\"`";
            return Err(Error::recipe("quantization.weights", reason));
        }
        if inputs.iter().any(|input| input.hadamard && input.width == InputWidth::Full) {
            let reason = "rotates an input that is not quantized";
            return Err(Error::recipe("quantization.hadamard", reason));
        }
        Ok(())
    }
}
