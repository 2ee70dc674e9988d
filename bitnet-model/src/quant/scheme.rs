//! Which quantizer each projection of a model has.

use super::{ActivationCodes, ActivationQuantizer, Rounding, WeightQuantizer};

/// What weights become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightKind {
    /// [`WeightQuantizer::Absmean`]
    #[default]
    Absmean,
    /// [`WeightQuantizer::Sign`]
    Sign,
    /// They stay as they are.
    Full,
}

/// What activations become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InputWidth {
    /// [`ActivationCodes::Int8`]
    #[default]
    Int8,
    /// [`ActivationCodes::Int4`]
    Int4,
    /// They stay as they are.
    Full,
}

/// The input of one kind of projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InputKind {
    /// Its codes.
    pub width: InputWidth,
    /// Whether it is rotated first; of no effect on an input that stays as it is.
    pub hadamard: bool,
}

/// The quantizers of a model; by default [those of b1.58](Self::B158).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// All projections' weights.
    pub weights: WeightKind,
    /// The input of `q_proj`, `k_proj` and `v_proj`, and that of `gate_proj` and `up_proj`: the residual stream, normed.
    pub stream: InputKind,
    /// The input of `o_proj`.
    pub o_proj: InputKind,
    /// The input of `down_proj`.
    pub down_proj: InputKind,
}

impl Default for Scheme {
    fn default() -> Self {
        Self::B158
    }
}

impl Scheme {
    /// Ternary weights and int8 activations.
    pub const B158: Self = {
        let int8 = InputKind { width: InputWidth::Int8, hadamard: false };
        Self { weights: WeightKind::Absmean, stream: int8, o_proj: int8, down_proj: int8 }
    };

    /// The quantizer of the weights; `None` if they stay as they are.
    pub fn weight(&self, rounding: Rounding) -> Option<WeightQuantizer> {
        match self.weights {
            WeightKind::Absmean => Some(WeightQuantizer::Absmean(rounding)),
            WeightKind::Sign => Some(WeightQuantizer::Sign),
            WeightKind::Full => None,
        }
    }

    /// How the projection `name`, such as `q_proj`, takes its input.
    pub fn input(&self, name: &str) -> InputKind {
        match name {
            "o_proj" => self.o_proj,
            "down_proj" => self.down_proj,
            _ => self.stream,
        }
    }
}

impl InputKind {
    /// The quantizer; `None` if the input stays as it is.
    pub fn quantizer(self, rounding: Rounding) -> Option<ActivationQuantizer> {
        let codes = match self.width {
            InputWidth::Int8 => ActivationCodes::Int8(rounding),
            InputWidth::Int4 => ActivationCodes::Int4(rounding),
            InputWidth::Full => return None,
        };
        Some(ActivationQuantizer { codes, hadamard: self.hadamard })
    }
}
