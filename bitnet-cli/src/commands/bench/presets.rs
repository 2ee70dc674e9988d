//! What the words of `--preset` and `--level` stand for. `bitnet bench --help` has the same numbers.

use bitnet_model::{kernels::head::HeadFormat, nn::HeadPrecision, ops::KvType};
use clap::ValueEnum;
use serde::Serialize;

/// The kernel that every processor can run.
pub const PORTABLE: &str = "scalar";

/// A kind of machine.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// A telephone: 4 threads, 2 GiB, one conversation
    Mobile,
    /// A small computer: 8 threads, 8 GiB, up to 4 conversations
    Edge,
    /// A server that does other things too: three quarters of its memory
    Server,
    /// A server for this alone: nine tenths of its memory
    Cloud,
}

/// What a preset allows on one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Threads to compute with.
    pub threads: usize,
    /// Bytes for everything.
    pub memory: u64,
    /// Tokens of a sequence, if the model has as many.
    pub context: usize,
    /// The most sequences at once.
    pub batch: usize,
}

impl Preset {
    /// On a machine of `processors` and `memory` available bytes.
    pub fn allowance(self, processors: usize, memory: u64) -> Allowance {
        const GIB: u64 = 1 << 30;
        match self {
            Self::Mobile => Allowance {
                threads: processors.min(4),
                memory: (memory / 2).min(2 * GIB),
                context: 2048,
                batch: 1,
            },
            Self::Edge => Allowance {
                threads: processors.min(8),
                memory: (memory / 2).min(8 * GIB),
                context: 4096,
                batch: 4,
            },
            Self::Server => {
                Allowance { threads: processors, memory: memory / 4 * 3, context: 8192, batch: 32 }
            }
            Self::Cloud => Allowance {
                threads: processors,
                memory: memory / 10 * 9,
                context: 8192,
                batch: 128,
            },
        }
    }
}

/// How much of what makes the program fast is used.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The portable kernel, keys and values in f32, a head that is not screened
    Baseline,
    /// The defaults
    Optimized,
    /// Keys and values in int8, a head of 4 bits
    Aggressive,
}

impl Level {
    /// The output head.
    pub fn lm_head(self) -> HeadPrecision {
        match self {
            Self::Baseline | Self::Optimized => HeadPrecision::Exact,
            Self::Aggressive => HeadPrecision::Quantized(HeadFormat::Q4),
        }
    }

    /// Keys and values.
    pub fn kv_type(self) -> KvType {
        match self {
            Self::Baseline => KvType::F32,
            Self::Optimized => KvType::F16,
            Self::Aggressive => KvType::Int8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowances_follow_the_machine() {
        let gib = |n: u64| n << 30;
        let small = Preset::Mobile.allowance(2, gib(3));
        assert_eq!((small.threads, small.memory), (2, gib(3) / 2));
        let large = Preset::Mobile.allowance(64, gib(64));
        assert_eq!((large.threads, large.memory), (4, gib(2)));
        let edge = Preset::Edge.allowance(64, gib(64));
        assert_eq!((edge.threads, edge.memory), (8, gib(8)));
        assert_eq!(Preset::Server.allowance(64, gib(64)).memory, gib(48));
        assert!(Preset::Cloud.allowance(64, gib(64)).memory > gib(57));
    }
}
