//! Which limit of the machine bounds a test, and at what speed.

use bitnet_model::{kv_cache::KvCache, model::Model, ops::KvType, session::PREFILL_CHUNK};
use serde::Serialize;

use super::plan::{Kind, Test};
use crate::limits::Limits;

/// What a token costs, as the model has it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Work {
    /// Weights of the projections if they are ternary: products of a token.
    pub ternary_weights: Option<usize>,
    /// Weights of the output head: products of a row of logits.
    pub head_weights: usize,
    /// Bytes of the projections' weights as they are stored; absent for a model in full precision.
    pub projection_bytes: Option<usize>,
    /// Bytes of the head that every step reads.
    pub head_bytes: usize,
    /// Bytes of each row of the head that is multiplied again.
    pub head_row_bytes: usize,
    /// Bytes of keys and values of one token of context.
    pub kv_token_bytes: usize,
}

/// What bounds a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Reading from memory.
    Memory,
    /// The ternary kernel on cached weights.
    Cache,
    /// The multiply instruction.
    Multiply,
}

/// A limit and the speed it allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    /// Which.
    pub limit: Limit,
    /// Tokens of all sequences a second.
    pub tokens_per_second: f64,
}

impl Limit {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cache => "cache",
            Self::Multiply => "multiply",
        }
    }
}

impl Work {
    /// Of a token of `model`.
    pub fn of(model: &Model, kv_type: KvType) -> Self {
        let config = model.config();
        let weights = || config.projections().map(|(_, (rows, cols))| rows * cols).sum();
        let head = model.lm_head();
        Self {
            ternary_weights: config.quantization.map(|_| weights()),
            head_weights: config.vocab_size * config.hidden_size,
            projection_bytes: model.projection_bytes(),
            head_bytes: head.bytes(),
            head_row_bytes: head.rescored_row_bytes(),
            kv_token_bytes: KvCache::token_bytes(config, kv_type),
        }
    }

    /// Bytes read from memory for each token of `test`, whose tokens had `rescored` rows of the head multiplied again.
    /// A prompt's keys and values are read from the cache and do not count.
    pub fn bytes_a_token(&self, test: &Test, rescored: f64) -> Option<f64> {
        let (projections, head) = (self.projection_bytes? as f64, self.head_bytes as f64);
        let rescored = rescored * self.head_row_bytes as f64;
        Some(match test.kind {
            Kind::Prompt { tokens } => {
                let passes = tokens.div_ceil(PREFILL_CHUNK.get()) as f64;
                (passes * projections + head + rescored) / tokens as f64
            }
            Kind::Generate { tokens, depth } => {
                // The first of the tokens sees one behind `depth`, the last sees all.
                let context = depth as f64 + (tokens as f64 + 1.) / 2.;
                let of_each = rescored + context * self.kv_token_bytes as f64;
                (projections + head) / test.batch as f64 + of_each
            }
        })
    }

    /// The tightest bound of `test`. `cache` is the size of the last-level cache, if known: weights that fit are not
    /// read from memory. `None` for a model whose weights are not ternary.
    pub fn bound(
        &self,
        test: &Test,
        limits: &Limits,
        rescored: f64,
        cache: Option<usize>,
    ) -> Option<Bound> {
        let ternary = self.ternary_weights? as f64;
        let head = self.head_weights as f64;
        let products = match test.kind {
            Kind::Prompt { tokens } => ternary + head / tokens as f64,
            Kind::Generate { .. } => ternary + head,
        };
        let weight_bytes = self.projection_bytes? + self.head_bytes;
        let memory = limits.read_large_pages / self.bytes_a_token(test, rescored)?;
        let alone = matches!(test.kind, Kind::Generate { .. }) && test.batch == 1;
        let bounds = [
            (cache.is_none_or(|cache| weight_bytes > cache), Limit::Memory, memory),
            (alone, Limit::Cache, limits.cached_ternary / ternary),
            (true, Limit::Multiply, limits.multiply / products),
        ];
        let bounds = bounds.into_iter().filter(|bound| bound.0);
        let bounds = bounds.map(|(_, limit, tokens_per_second)| Bound { limit, tokens_per_second });
        bounds.min_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work {
        ternary_weights: Some(2000),
        head_weights: 300,
        projection_bytes: Some(500),
        head_bytes: 300,
        head_row_bytes: 10,
        kv_token_bytes: 2,
    };

    const LIMITS: Limits = Limits {
        threads: 2,
        read_large_pages: 8e4,
        read_small_pages: 4e4,
        multiply: 1e6,
        cached_ternary: 4e5,
        streamed_ternary: 3e5,
    };

    fn generate(tokens: usize, depth: usize, batch: usize) -> Test {
        Test { kind: Kind::Generate { tokens, depth }, threads: 2, batch }
    }

    #[test]
    fn bytes_of_tokens() {
        // Contexts 101, 102, 103.
        let bytes = WORK.bytes_a_token(&generate(3, 100, 1), 7.).unwrap();
        assert_eq!(bytes, 500. + 300. + 70. + 204.);
        let bytes = WORK.bytes_a_token(&generate(3, 100, 4), 7.).unwrap();
        assert_eq!(bytes, 200. + 70. + 204.);
        let tokens = PREFILL_CHUNK.get() + 1;
        let prompt = Test { kind: Kind::Prompt { tokens }, threads: 2, batch: 1 };
        assert_eq!(WORK.bytes_a_token(&prompt, 0.).unwrap(), 1300. / tokens as f64);
    }

    #[test]
    fn the_tightest_bound_counts() {
        let bound = |test, cache| WORK.bound(&test, &LIMITS, 0., cache).unwrap();
        let alone = bound(generate(1, 0, 1), Some(100));
        assert_eq!(alone, Bound { limit: Limit::Memory, tokens_per_second: 8e4 / 802. });
        let cached = bound(generate(1, 0, 1), Some(1000));
        assert_eq!(cached, Bound { limit: Limit::Cache, tokens_per_second: 200. });
        let many = bound(generate(1, 0, 64), None);
        assert_eq!(many, Bound { limit: Limit::Multiply, tokens_per_second: 1e6 / 2300. });
        let prompt = Test { kind: Kind::Prompt { tokens: 100 }, threads: 2, batch: 1 };
        let prompt = bound(prompt, None);
        assert_eq!(prompt, Bound { limit: Limit::Multiply, tokens_per_second: 1e6 / 2003. });
        let dense = Work { ternary_weights: None, ..WORK };
        assert_eq!(dense.bound(&generate(1, 0, 1), &LIMITS, 0., None), None);
    }
}
