//! Fixtures: checkpoints in the Hub's layout with what the reference Python stack computed from them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use bitnet_model::{
    checkpoint::Checkpoint,
    config::Config,
    model::Model,
    nn::{BitLinears, LinearFactory},
};
use candle_core::{DType, Device, Tensor};

/// One fixture folder.
pub struct Fixture {
    pub name: String,
    pub dir: PathBuf,
    pub config: Config,
    pub checkpoint: Arc<Checkpoint>,
    pub expected: HashMap<String, Tensor>,
    pub scalars: serde_json::Value,
}

/// The folder of all fixtures; `BITNET_FIXTURES` names another one.
pub fn root() -> PathBuf {
    match std::env::var_os("BITNET_FIXTURES") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"),
    }
}

impl Fixture {
    pub fn open(name: &str) -> Self {
        let dir = root().join(name);
        let config_path = dir.join("config.json");
        let mut config = Config::from_file(&config_path).unwrap();
        if name.contains("onebit_") {
            config = config.ternarize(&config_path).unwrap();
        }
        let mut files: Vec<PathBuf> = std::fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("model"))
            .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
        config.check_tensors(&checkpoint).unwrap();
        let expected =
            candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu).unwrap();
        let scalars = std::fs::read_to_string(dir.join("expected.json")).unwrap();
        let scalars = serde_json::from_str(&scalars).unwrap();
        Self { name: name.into(), dir, config, checkpoint, expected, scalars }
    }

    /// Every fixture with a forward pass.
    pub fn forward() -> Vec<Self> {
        let mut names: Vec<String> = std::fs::read_dir(root())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("grad_") && !name.starts_with("lora_"))
            .filter(|name| root().join(name).join("expected.safetensors").exists())
            .collect();
        names.sort();
        assert!(names.len() >= 8, "fixtures are missing: only {names:?}");
        names.iter().map(|name| Self::open(name)).collect()
    }

    pub fn model_with(&self, linears: &dyn LinearFactory) -> Model {
        let vb = self.checkpoint.var_builder(DType::F32, &Device::Cpu);
        Model::load(&self.config, linears, vb).unwrap()
    }

    pub fn model(&self) -> Model {
        self.model_with(&BitLinears::new(self.config.quantization.unwrap()))
    }

    /// An expected f32 tensor, flattened.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.expected.get(name).unwrap_or_else(|| panic!("{}: {name}", self.name));
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// An expected integer tensor as rows.
    pub fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        self.expected[name].to_dtype(DType::I64).unwrap().to_vec2().unwrap()
    }

    /// Token ids (batch, seq) as the model takes them.
    pub fn tokens(&self, name: &str) -> Tensor {
        self.expected[name].to_dtype(DType::U32).unwrap()
    }
}

/// Largest absolute difference.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0., f32::max)
}

/// Root mean square of the difference over that of `b`.
pub fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (error / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

/// A tensor's elements.
pub fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
