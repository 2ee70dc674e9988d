//! Which quantizer each projection of a model has.

use std::fmt;

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

impl fmt::Display for Scheme {
    /// `sign weights, int4 activations (o_proj int4 rotated, down_proj int4 rotated)`: inputs that are as the stream is are
    /// left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights = match self.weights {
            WeightKind::Absmean => "absmean",
            WeightKind::Sign => "sign",
            WeightKind::Full => "unquantized",
        };
        write!(f, "{weights} weights, {} activations", self.stream)?;
        let others = [("o_proj", self.o_proj), ("down_proj", self.down_proj)];
        let others: Vec<String> = others
            .iter()
            .filter(|(_, input)| *input != self.stream)
            .map(|(name, input)| format!("{name} {input}"))
            .collect();
        match others.is_empty() {
            true => Ok(()),
            false => write!(f, " ({})", others.join(", ")),
        }
    }
}

impl fmt::Display for InputKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.width {
            InputWidth::Int8 => "int8",
            InputWidth::Int4 => "int4",
            InputWidth::Full => "unquantized",
        })?;
        f.write_str(if self.hadamard { " rotated" } else { "" })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_say_what_they_are() {
        assert_eq!(Scheme::B158.to_string(), "absmean weights, int8 activations");
        let rotated = InputKind { width: InputWidth::Int4, hadamard: true };
        let scheme = Scheme { weights: WeightKind::Sign, down_proj: rotated, ..Scheme::B158 };
        assert_eq!(scheme.to_string(), "sign weights, int8 activations (down_proj int4 rotated)");
    }
}
