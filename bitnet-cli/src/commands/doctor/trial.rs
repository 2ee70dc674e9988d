//! A back end tried on the embedded model, in a process of its own: one that crashes or hangs ends nothing else, and a process
//! computes with one kernel only.

use std::{
    env,
    io::{self, Read, Write},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bitnet_model::{
    fingerprint::fingerprint,
    hub::Hub,
    kv_cache::KvCache,
    model::Model,
    ops::KvType,
    pretrained::{DEFAULT, Precision, Source},
    sampler::argmax,
};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::{args::Global, commands::logits::logits};

/// What is continued: more tokens than one, which takes other routines than one does.
const PROMPT: &str =
    "Once upon a time there was a little girl named Lily. She loved to play outside in the";

/// Tokens that follow.
const NEW_TOKENS: usize = 48;

/// How often they are generated. The fastest time counts; the results must be the same each time.
const ROUNDS: usize = 3;

/// The time after which a trial counts as hanging. A device that is used for the first time compiles its kernels.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the end of a trial is looked for.
const TURN: Duration = Duration::from_millis(5);

/// What a back end made of the prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Tokens generated, each the best.
    pub tokens: Vec<u32>,
    /// A digest of the bits of the logits after every token, the prompt's first.
    pub digests: Vec<String>,
    /// Tokens generated a second.
    pub tokens_per_second: f64,
}

/// Tries the back end that `--kernel` and `--device` name, and prints the [`Outcome`] as JSON.
pub fn run(global: &Global) -> anyhow::Result<()> {
    let outcome = Outcome::of(&global.device()?)?;
    Ok(writeln!(io::stdout(), "{}", serde_json::to_value(outcome)?)?)
}

impl Outcome {
    fn of(device: &Device) -> anyhow::Result<Self> {
        let source = Source::open(DEFAULT, Precision::default(), &Hub::from_env())?;
        let tokenizer = source.tokenizer()?.context("the embedded model has no tokenizer")?;
        let prompt = tokenizer.encode(PROMPT, true)?;
        let model = source.load(device)?;
        let mut cache = model.cache(KvType::default(), 1);
        let read = logits(&model, &prompt, &mut cache)?;
        let last = read.last().context("there is no prompt")?;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            cache.truncate(prompt.len());
            rounds.push(Round::generate(&model, last, &mut cache)?);
        }
        let Some(fastest) = rounds.iter().min_by_key(|round| round.time) else {
            bail!("no rounds")
        };
        if let Some(round) = rounds.iter().position(|round| round.digests != fastest.digests) {
            bail!("its results differ from one time to the next (time {} of {ROUNDS})", round + 1);
        }
        let of_prompt = read.iter().map(|logits| digest(logits));
        Ok(Self {
            tokens: fastest.tokens.clone(),
            digests: of_prompt.chain(fastest.digests.iter().cloned()).collect(),
            tokens_per_second: NEW_TOKENS as f64 / fastest.time.as_secs_f64(),
        })
    }
}

/// One time of generating.
struct Round {
    tokens: Vec<u32>,
    digests: Vec<String>,
    time: Duration,
}

impl Round {
    /// Continues what `cache` holds, after whose last token the logits are `last`.
    fn generate(model: &Model, last: &[f32], cache: &mut KvCache) -> anyhow::Result<Self> {
        let mut all = vec![last.to_vec()];
        let start = Instant::now();
        for _ in 0..NEW_TOKENS {
            let best = all.last().map_or(0, |logits| argmax(logits));
            all.extend(logits(model, &[best as u32], cache)?);
        }
        let time = start.elapsed();
        let tokens = all.iter().take(NEW_TOKENS).map(|logits| argmax(logits) as u32).collect();
        let digests = all.iter().skip(1).map(|logits| digest(logits)).collect();
        Ok(Self { tokens, digests, time })
    }
}

fn digest(logits: &[f32]) -> String {
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_bits().to_le_bytes()).collect();
    fingerprint(bytes)
}

/// Starts this program again to try `kernel` on `device`, and waits for the outcome, or why there is none.
pub fn start(kernel: &str, device: &str, global: &Global) -> Result<Outcome, String> {
    let program =
        env::current_exe().map_err(|error| format!("this program is not found: {error}"))?;
    let threads = global.threads.iter().flat_map(|count| ["--threads".into(), count.to_string()]);
    let child = Command::new(program)
        .args(["trial", "--kernel", kernel, "--device", device, "--log", "error"])
        .args(threads)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let child = child.map_err(|error| format!("this program cannot be started again: {error}"))?;
    outcome(child, PATIENCE)
}

/// What a trial prints until it ends, which is less than a pipe holds.
fn outcome(mut child: Child, patience: Duration) -> Result<Outcome, String> {
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() < patience => thread::sleep(TURN),
            ended => {
                // Whether it is there to be killed does not matter any more.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(match ended {
                    Err(error) => error.to_string(),
                    Ok(_) => format!("it does not end: it was stopped after {patience:?}"),
                });
            }
        }
    };
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let read =
        |pipe: Option<&mut dyn Read>, text| pipe.map_or(Ok(0), |pipe| pipe.read_to_end(text));
    read(child.stdout.as_mut().map(|pipe| pipe as _), &mut stdout)
        .and_then(|_| read(child.stderr.as_mut().map(|pipe| pipe as _), &mut stderr))
        .map_err(|error| error.to_string())?;
    if !status.success() {
        let said = String::from_utf8_lossy(&stderr);
        let said = said.lines().next_back().unwrap_or_default();
        let said = said.strip_prefix("error: ").unwrap_or(said);
        return Err(match said {
            "" => status.to_string(), // such as `signal: 4 (SIGILL)`
            _ if status.code().is_some() => said.into(),
            _ => format!("{status}: {said}"),
        });
    }
    serde_json::from_slice(&stdout)
        .map_err(|error| format!("its answer is not understood: {error}"))
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: Duration) -> Result<Outcome, String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
        outcome(command.spawn().unwrap(), patience)
    }

    #[test]
    fn whatever_a_trial_does_is_told() {
        let long = Duration::from_secs(20);
        let expected =
            Outcome { tokens: vec![3], digests: vec!["ab".into()], tokens_per_second: 2. };
        let answer = serde_json::to_string(&expected).unwrap();
        assert_eq!(shell(&format!("echo '{answer}'"), long), Ok(expected));
        assert_eq!(shell("echo warning >&2; echo error: no >&2; exit 1", long), Err("no".into()));
        assert!(shell("kill -9 $$", long).unwrap_err().contains("signal: 9"));
        assert!(shell("echo half", long).unwrap_err().contains("not understood"));
        assert!(shell("exec sleep 20", Duration::ZERO).unwrap_err().contains("does not end"));
    }
}
