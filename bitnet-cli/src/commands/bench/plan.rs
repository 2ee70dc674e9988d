//! What to measure: flags, preset and level, resolved and checked against the model and the machine before anything is
//! loaded.

use std::{num::NonZeroUsize, path::Path};

use anyhow::{bail, ensure};
use bitnet_model::{kv_cache::KvCache, ops::KvType, pretrained::Source, threads};

use super::{
    Args,
    memory::{model_bytes, working_bytes},
    presets::{Allowance, Level},
};
use crate::{machine::available_memory, statistics::Bytes};

/// One line of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// What is timed.
    pub kind: Kind,
    /// Threads to compute with.
    pub threads: usize,
    /// Sequences at once.
    pub batch: usize,
}

/// What a test times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reading a prompt, up to the logits after its last token.
    Prompt {
        /// Its length.
        tokens: usize,
    },
    /// Generating.
    Generate {
        /// How many tokens.
        tokens: usize,
        /// Tokens that are there before.
        depth: usize,
    },
}

impl Test {
    /// As llama-bench has it: `pp512`, `tg128`, `tg128@2048`.
    pub fn name(&self) -> String {
        match self.kind {
            Kind::Prompt { tokens } => format!("pp{tokens}"),
            Kind::Generate { tokens, depth: 0 } => format!("tg{tokens}"),
            Kind::Generate { tokens, depth } => format!("tg{tokens}@{depth}"),
        }
    }

    /// Tokens of each sequence before the test.
    pub fn depth(&self) -> usize {
        match self.kind {
            Kind::Prompt { .. } => 0,
            Kind::Generate { depth, .. } => depth,
        }
    }

    /// Tokens of each sequence at the end of the test.
    pub fn context(&self) -> usize {
        match self.kind {
            Kind::Prompt { tokens } => tokens,
            Kind::Generate { tokens, depth } => depth.saturating_add(tokens),
        }
    }

    /// Tokens that are timed, of all sequences.
    pub fn tokens(&self) -> usize {
        match self.kind {
            Kind::Prompt { tokens } | Kind::Generate { tokens, .. } => tokens * self.batch,
        }
    }
}

/// A validated run.
#[derive(Debug)]
pub struct Plan {
    /// In the order in which they run: tests with the same tokens before them follow one another.
    pub tests: Vec<Test>,
    /// Numbers of threads, each once, ascending.
    pub threads: Vec<usize>,
    /// Samples of each test.
    pub repetitions: usize,
    /// Keys and values.
    pub kv_type: KvType,
    /// Whether a large exact head is screened.
    pub screened: bool,
    /// The memory of the preset.
    pub memory_limit: Option<u64>,
}

impl Plan {
    /// Resolves the flags. `threads` is what `--threads` says.
    ///
    /// # Errors
    /// Numbers that make no sense, tests that the model's context cannot hold, more memory than there is.
    pub fn new(args: &Args, threads: &[usize], source: &Source) -> anyhow::Result<Self> {
        ensure!(args.repetitions > 0, "--repetitions 0 measures nothing: give at least 1");
        ensure!(!args.batch.contains(&0), "--batch 0 is no sequence: give at least 1");
        let kv_type = args.kv_cache.unwrap_or_else(|| match args.model.low_memory {
            true => args.model.kv_type(),
            false => args.level.kv_type(),
        });
        let screened =
            args.level != Level::Baseline || args.model.lm_head.is_some() || args.model.low_memory;
        let memory = Memory {
            available: available_memory(Path::new("/")),
            model: model_bytes(source, screened),
            kv_token: KvCache::token_bytes(&source.config, kv_type) as u64,
        };
        let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let allowance = args
            .preset
            .map(|preset| preset.allowance(processors, memory.available.unwrap_or(u64::MAX)));
        let threads = match (threads, &allowance) {
            ([], Some(allowance)) => vec![allowance.threads],
            ([], None) => vec![threads::count()],
            _ => threads.to_vec(),
        };
        let threads = ascending(&threads);
        let prompts = ascending(&args.n_prompt).into_iter().filter(|&tokens| tokens > 0);
        let lengths: Vec<usize> =
            ascending(&args.n_gen).into_iter().filter(|&tokens| tokens > 0).collect();
        let mut tests = Vec::new();
        for tokens in prompts {
            let kind = Kind::Prompt { tokens };
            tests.extend(threads.iter().map(|&threads| Test { kind, threads, batch: 1 }));
        }
        for (batch, depth) in memory.states(args, allowance.as_ref(), source) {
            for &tokens in &lengths {
                let kind = Kind::Generate { tokens, depth };
                tests.extend(threads.iter().map(|&threads| Test { kind, threads, batch }));
            }
        }
        ensure!(
            !tests.is_empty(),
            "there is nothing to measure: give --n-prompt or --n-gen above 0"
        );
        let plan = Self {
            tests,
            threads,
            repetitions: args.repetitions,
            kv_type,
            screened,
            memory_limit: allowance.map(|allowance| allowance.memory),
        };
        plan.check_context(source)?;
        plan.check_memory(&memory, source)?;
        Ok(plan)
    }

    fn check_context(&self, source: &Source) -> anyhow::Result<()> {
        let context = source.config.max_position_embeddings;
        if let Some(test) = self.tests.iter().find(|test| test.context() > context) {
            bail!(
                "{} needs a context of {} tokens, but the model's holds {context}: \
                 lower --n-prompt, --n-gen or --depth",
                test.name(),
                test.context()
            );
        }
        Ok(())
    }

    fn check_memory(&self, memory: &Memory, source: &Source) -> anyhow::Result<()> {
        let bytes = |test: &Test| memory.needed(source, test.batch, test.context());
        let Some(test) = self.tests.iter().max_by_key(|test| bytes(test)) else { return Ok(()) };
        let (limit, whose) = match (self.memory_limit, memory.available) {
            (Some(limit), _) => (limit, "the preset allows"),
            (None, Some(available)) => (available, "this machine has available"),
            (None, None) => return Ok(()),
        };
        let needed = bytes(test);
        if needed > limit {
            bail!(
                "{}: {} with {} sequences takes about {} of memory, but {whose} {}: \
                 lower --batch or --depth, or take a smaller model",
                source.name,
                test.name(),
                test.batch,
                Bytes(needed),
                Bytes(limit),
            );
        }
        Ok(())
    }
}

/// What memory a run has to get along with.
struct Memory {
    available: Option<u64>,
    model: u64,
    /// Keys and values of a token.
    kv_token: u64,
}

impl Memory {
    /// Bytes for `batch` sequences of `context` tokens. A cache that grows is copied: twice its size.
    fn needed(&self, source: &Source, batch: usize, context: usize) -> u64 {
        let cached = [2, batch as u64, context as u64].into_iter();
        let cache = cached.fold(self.kv_token, u64::saturating_mul);
        cache.saturating_add(self.model).saturating_add(working_bytes(&source.config, batch))
    }

    /// Numbers of sequences and tokens before them, for which generating is timed.
    fn states(
        &self,
        args: &Args,
        allowance: Option<&Allowance>,
        source: &Source,
    ) -> Vec<(usize, usize)> {
        let given = |numbers: &[usize], default| match numbers {
            [] => vec![default],
            _ => ascending(numbers),
        };
        let Some(allowance) = allowance.filter(|_| args.batch.is_empty() && args.depth.is_empty())
        else {
            let depths = given(&args.depth, 0);
            let states = given(&args.batch, 1).into_iter();
            return states
                .flat_map(|batch| depths.iter().map(move |&depth| (batch, depth)))
                .collect();
        };
        let context = allowance.context.min(source.config.max_position_embeddings);
        let longest = args.n_gen.iter().copied().max().unwrap_or(0);
        let mut batch = allowance.batch;
        while batch > 1 && self.needed(source, batch, context) > allowance.memory {
            batch /= 2;
        }
        let mut states = vec![(1, 0)];
        states.extend((context > longest).then(|| (1, context - longest)));
        states.extend((batch > 1).then_some((batch, 0)));
        states
    }
}

/// Each number once, in order.
fn ascending(numbers: &[usize]) -> Vec<usize> {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_tokens_of_tests() {
        let prompt = Test { kind: Kind::Prompt { tokens: 512 }, threads: 2, batch: 1 };
        assert_eq!(
            (prompt.name().as_str(), prompt.tokens(), prompt.context()),
            ("pp512", 512, 512)
        );
        let deep = Test { kind: Kind::Generate { tokens: 64, depth: 2048 }, threads: 1, batch: 8 };
        assert_eq!((deep.name().as_str(), deep.tokens(), deep.context()), ("tg64@2048", 512, 2112));
        let empty = Test { kind: Kind::Generate { tokens: 3, depth: 0 }, ..deep };
        assert_eq!(empty.name(), "tg3");
        assert_eq!(ascending(&[2, 1, 2]), [1, 2]);
    }
}
