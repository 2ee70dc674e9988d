//! The state of a run on disk: what it takes to resume with the same bits.
//!
//! ```text
//! OUTPUT/step-N/model.safetensors       latent weights, f32
//!               optimizer.safetensors   moments
//!               codes.safetensors       ternary codes of the last census, if there was one
//!               trainer_state.json      step, position in the data, best evaluation, detectors, recipe
//! OUTPUT/best.safetensors               latent weights of the best evaluation
//! ```
//!
//! A checkpoint is written to `.step-N`, forced to the disk and then renamed: a directory `step-N` is complete,
//! whenever the process dies.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    batch::Position,
    codes::Census,
    detector::{Collapse, Divergence},
    optimizer::AdamW,
};

pub mod tensors;

use tensors::{TensorFile, write_tensors};

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";
const BEST: &str = "best.safetensors";
const PREFIX: &str = "step-";

/// Everything of a run that is neither a weight nor a moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Updates made.
    pub step: usize,
    /// Where the next batch is drawn.
    pub position: Position,
    /// Tokens trained on.
    pub tokens: u64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub evaluations_since_best: usize,
    /// What the losses of the updates have been like.
    #[serde(default)]
    pub divergence: Divergence,
    /// What the predictions of the evaluations have been like.
    #[serde(default)]
    pub collapse: Collapse,
    /// The recipe, to refuse a resume that would silently be another run.
    pub recipe: serde_json::Value,
    /// Fingerprint of the training and validation tokens, for the same reason.
    pub dataset: [u64; 2],
}

impl TrainerState {
    /// Updates after which trouble that is going on may have begun: the weights after fewer are good.
    pub fn trouble(&self) -> Option<usize> {
        self.divergence.trouble().into_iter().chain(self.collapse.trouble()).min()
    }
}

/// The best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// The step after which it was made.
    pub step: usize,
    /// Held-out loss.
    pub nats_per_byte: f64,
}

/// The checkpoints of one output directory.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    limit: Option<usize>,
}

impl Checkpoints {
    /// Creates the directory if need be and clears away what a killed process left half-written. At most `limit`
    /// checkpoints are kept.
    pub fn open(dir: &Path, limit: Option<usize>) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        clear_half_written(dir)?;
        Ok(Self { dir: dir.to_owned(), limit })
    }

    /// Writes the checkpoint of `state.step` and removes the oldest beyond the limit. While there is trouble the
    /// newest from before it stays.
    pub fn save(
        &self,
        state: &TrainerState,
        parameters: &[(String, Var)],
        optimizer: &AdamW,
        census: &Census,
    ) -> Result<PathBuf> {
        let name = format!("{PREFIX}{}", state.step);
        let (path, partial) = (self.dir.join(&name), self.dir.join(format!(".{name}")));
        fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
        if let Err(error) = write(&partial, state, parameters, optimizer, census) {
            // The disk may be full: give back what was taken. The first error is the one to report.
            let _ = fs::remove_dir_all(&partial);
            return Err(error);
        }
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?; // one that lacks a file, or `latest` had found it
        }
        fs::rename(&partial, &path).map_err(Error::io(&path))?;
        sync_dir(&self.dir)?;
        self.prune(state.trouble())?;
        Ok(path)
    }

    /// Writes the weights of the best evaluation, replacing earlier ones at one stroke.
    pub fn save_best(&self, parameters: &[(String, Var)]) -> Result<()> {
        write_weights(&self.best(), parameters)
    }

    /// The file of the best weights.
    pub fn best(&self) -> PathBuf {
        self.dir.join(BEST)
    }

    /// The newest complete checkpoint.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        self.newest_below(usize::MAX)
    }

    /// The newest complete checkpoint of fewer updates than `steps`.
    pub fn newest_below(&self, steps: usize) -> Result<Option<PathBuf>> {
        let complete =
            |path: &PathBuf| [MODEL, OPTIMIZER, STATE].iter().all(|file| path.join(file).is_file());
        let below = self.list()?.into_iter().rev().filter(|(step, _)| *step < steps);
        Ok(below.map(|(_, path)| path).find(complete))
    }

    /// All checkpoints with their updates, oldest first.
    fn list(&self) -> Result<Vec<(usize, PathBuf)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let entry = entry.map_err(Error::io(&self.dir))?;
            if let Some(step) = entry.file_name().to_str().and_then(step_of) {
                found.push((step, entry.path()));
            }
        }
        found.sort();
        Ok(found)
    }

    fn prune(&self, trouble: Option<usize>) -> Result<()> {
        let Some(limit) = self.limit else { return Ok(()) };
        let mut paths = self.list()?;
        paths.truncate(paths.len().saturating_sub(limit));
        let good = trouble.map(|since| self.newest_below(since)).transpose()?.flatten();
        let surplus =
            paths.into_iter().map(|(_, path)| path).filter(|path| good.as_ref() != Some(path));
        surplus.into_iter().try_for_each(|path| fs::remove_dir_all(&path).map_err(Error::io(path)))
    }
}

/// Removes partial checkpoints from a run's folder, and the temporary files of atomic writes from it and the folders in it.
fn clear_half_written(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let hidden = name.strip_prefix('.').unwrap_or_default();
        match path.is_dir() {
            true if step_of(hidden).is_some() => {
                fs::remove_dir_all(&path).map_err(Error::io(&path))?;
            }
            true if !path.is_symlink() => clear_temporary(&path)?,
            _ => (),
        }
    }
    clear_temporary(dir)
}

/// Removes what [`bitnet_model::checkpoint::write_atomic`] leaves in a folder when it is killed: `.XXXXXX.tmp`.
fn clear_temporary(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let random = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
        let is_random = |random: &str| {
            random.len() == 6 && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        if random.is_some_and(is_random) && path.is_file() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

/// `N` of `step-N`.
fn step_of(name: &str) -> Option<usize> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Reads the state of a checkpoint, and nothing else.
pub fn read_state(checkpoint: &Path) -> Result<TrainerState> {
    let path = checkpoint.join(STATE);
    let json = fs::read_to_string(&path).map_err(Error::io(&path))?;
    serde_json::from_str(&json)
        .map_err(|error| Error::Checkpoint { path, reason: error.to_string() })
}

/// Sets parameters and optimizer to those of a checkpoint.
pub fn load(checkpoint: &Path, parameters: &[(String, Var)], optimizer: &mut AdamW) -> Result<()> {
    load_weights(&checkpoint.join(MODEL), parameters)?;
    optimizer.load(&checkpoint.join(OPTIMIZER))
}

/// Sets parameters to the f32 tensors of their names in a safetensors file.
pub fn load_weights(path: &Path, parameters: &[(String, Var)]) -> Result<()> {
    let bytes = tensors::read(path)?;
    let file = TensorFile::parse(path, &bytes)?;
    parameters.iter().try_for_each(|(name, var)| file.load_var(name, var))
}

fn write(
    dir: &Path,
    state: &TrainerState,
    parameters: &[(String, Var)],
    optimizer: &AdamW,
    census: &Census,
) -> Result<()> {
    census.save(dir)?;
    write_weights(&dir.join(MODEL), parameters)?;
    optimizer.save(&dir.join(OPTIMIZER))?;
    let path = dir.join(STATE);
    let json = serde_json::to_string_pretty(state)
        .map_err(|error| Error::Checkpoint { path: path.clone(), reason: error.to_string() })?;
    fs::write(&path, json + "\n").map_err(Error::io(&path))?;
    tensors::sync(&path)?;
    sync_dir(dir)
}

fn write_weights(path: &Path, parameters: &[(String, Var)]) -> Result<()> {
    let tensors = parameters.iter().map(|(name, var)| -> (String, &Tensor) { (name.clone(), var) });
    write_tensors(path, tensors, ("format", "pt".into()))
}

/// Waits until renames in a directory are on the disk. Windows has no such call, and orders them itself.
fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::{
        detector::DivergenceLimits,
        optimizer::{AdamWConfig, Decay},
    };

    fn state(step: usize) -> TrainerState {
        TrainerState {
            step,
            position: Position { epoch: 2, index: 5 },
            tokens: 1 << 40,
            best: Some(Best { step: 3, nats_per_byte: 0.1 + 0.2 }),
            evaluations_since_best: 1,
            divergence: Divergence::default(),
            collapse: Collapse::default(),
            recipe: serde_json::json!({"train": {"seed": 1}}),
            dataset: [u64::MAX, 1],
        }
    }

    fn parameters(value: f32) -> Vec<(String, Var)> {
        vec![("w".into(), Var::new(&[[value, 2.]], &Device::Cpu).unwrap())]
    }

    fn adamw(parameters: &[(String, Var)]) -> AdamW {
        let config = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: Decay::Matrices };
        AdamW::new(parameters, config).unwrap()
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_checkpoint_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path(), None).unwrap();
        assert_eq!(checkpoints.latest().unwrap(), None);
        let saved = parameters(1.5);
        let path = checkpoints.save(&state(9), &saved, &adamw(&saved), &Census::default()).unwrap();
        assert_eq!(checkpoints.latest().unwrap().as_ref(), Some(&path));
        assert_eq!(read_state(&path).unwrap(), state(9));
        let loaded = parameters(0.);
        load(&path, &loaded, &mut adamw(&loaded)).unwrap();
        assert_eq!(loaded[0].1.to_vec2::<f32>().unwrap(), [[1.5, 2.]]);
    }

    #[test]
    fn the_oldest_go_and_the_incomplete_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(".step-5")).unwrap();
        fs::create_dir(dir.path().join("latent")).unwrap();
        for file in [".a8Gx0b.tmp", "latent/.0000zz.tmp", "latent/config.json"] {
            fs::write(dir.path().join(file), "{").unwrap();
        }
        let checkpoints = Checkpoints::open(dir.path(), Some(2)).unwrap();
        let parameters = parameters(1.);
        for step in [8, 9, 10, 11] {
            checkpoints
                .save(&state(step), &parameters, &adamw(&parameters), &Census::default())
                .unwrap();
        }
        checkpoints.save_best(&parameters).unwrap();
        assert_eq!(names(dir.path()), ["best.safetensors", "latent", "step-10", "step-11"]);
        assert_eq!(names(&dir.path().join("latent")), ["config.json"]);
        fs::remove_file(dir.path().join("step-11").join(STATE)).unwrap();
        assert!(checkpoints.latest().unwrap().unwrap().ends_with("step-10"));
        // The damaged one is replaced when the resumed run comes to it again.
        let path = checkpoints
            .save(&state(11), &parameters, &adamw(&parameters), &Census::default())
            .unwrap();
        assert_eq!(checkpoints.latest().unwrap(), Some(path));
    }

    #[test]
    fn the_newest_from_before_trouble_stays() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path(), Some(2)).unwrap();
        let parameters = parameters(1.);
        for step in 1..=6 {
            let mut state = state(step);
            let limits = DivergenceLimits { margin: 0.3, updates: 9 };
            // The losses of updates 4 and 5 are too high: those of the weights after 3 and 4.
            for update in 1..=step {
                let loss = if [4, 5].contains(&update) { 8. } else { 1. };
                state.divergence.observe(update, loss, false, limits);
            }
            checkpoints.save(&state, &parameters, &adamw(&parameters), &Census::default()).unwrap();
            let expected: &[usize] =
                [&[1][..], &[1, 2], &[2, 3], &[2, 3, 4], &[2, 4, 5], &[5, 6]][step - 1];
            let expected: Vec<String> = expected.iter().map(|n| format!("step-{n}")).collect();
            assert_eq!(names(dir.path()), expected);
        }
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path(), None).unwrap();
        let parameters = parameters(1.);
        let path = checkpoints
            .save(&state(1), &parameters, &adamw(&parameters), &Census::default())
            .unwrap();
        let other = vec![("w".to_owned(), Var::new(&[1f32], &Device::Cpu).unwrap())];
        let message = load(&path, &other, &mut adamw(&other)).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: tensor `w`: is F32 [1, 2]"), "{message}");
        fs::write(path.join(MODEL), "short").unwrap();
        let message = load(&path, &parameters, &mut adamw(&parameters)).unwrap_err().to_string();
        assert!(message.contains("model.safetensors"), "{message}");
        fs::write(path.join(STATE), r#"{"step": 1}"#).unwrap();
        let message = read_state(&path).unwrap_err().to_string();
        assert!(message.contains("trainer_state.json: missing field `position`"), "{message}");
    }
}
