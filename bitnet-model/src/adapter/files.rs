//! [`Adapter`] ⇄ its folder.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Tensor};

use super::{Adapter, AdapterConfig, Pair, json};
use crate::{
    Error, Result,
    checkpoint::{Checkpoint, Dtype, SafetensorsWriter, TensorSpec, is_float, write_atomic},
    storage::with_slice,
};

/// The file of the settings.
pub const CONFIG: &str = "adapter_config.json";
/// The file of the tensors.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The tensors as PEFT once pickled them.
const PICKLE: &str = "adapter_model.bin";
/// What stands before a module's path in the file.
const PREFIX: &str = "base_model.model.";

/// The name of a pair's matrix in the file; `which` is `lora_A` or `lora_B`.
pub(super) fn key(path: &str, which: &str) -> String {
    format!("{PREFIX}{path}.{which}.weight")
}

/// The name of a whole tensor in the file.
pub(super) fn module_key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

/// What the name of a tensor says, without the [`PREFIX`] it has in the file.
enum Role {
    A(String),
    B(String),
    Module(String),
}

impl Role {
    fn parse(name: &str) -> Option<Self> {
        let path = name.strip_suffix(".weight")?;
        if let Some(path) = path.strip_suffix(".lora_A") {
            return Some(Self::A(path.into()));
        }
        if let Some(path) = path.strip_suffix(".lora_B") {
            return Some(Self::B(path.into()));
        }
        (!path.contains("lora_")).then(|| Self::Module(name.into()))
    }
}

impl Adapter {
    /// Reads the adapter in the folder `dir`. [`check`](Self::check) compares it with a model.
    ///
    /// # Errors
    /// Files that are absent or damaged; settings that cannot be computed here; tensors that are unknown, without their
    /// partner, of another shape than the settings say, or not finite.
    pub fn open(dir: &Path) -> Result<Self> {
        let (config, weights) = (dir.join(CONFIG), dir.join(WEIGHTS));
        let absent = |reason: String| Err(Error::Checkpoint { path: dir.into(), reason });
        if !dir.is_dir() {
            return absent(format!("not a folder with {CONFIG} and {WEIGHTS}"));
        }
        if !config.is_file() {
            let hint = match dir.join("config.json").is_file() {
                true => ": this is a model and no adapter",
                false => ", so this is no adapter in PEFT's format",
            };
            return absent(format!("{CONFIG} is not there{hint}"));
        }
        let config = json::read(&config)?;
        if !weights.is_file() {
            let hint = match dir.join(PICKLE).is_file() {
                true => format!(": convert {PICKLE} with PEFT's save_pretrained"),
                false => String::new(),
            };
            return absent(format!("{WEIGHTS} is not there{hint}"));
        }
        let mut adapter = Self::new(config, BTreeMap::new(), BTreeMap::new());
        adapter.origin = dir.into();
        adapter.read(&Checkpoint::open(&[weights])?)?;
        Ok(adapter)
    }

    /// The adapter of these tensors, f32, by their names in the model: `model.layers.0.self_attn.q_proj.lora_A.weight`.
    ///
    /// # Errors
    /// As [`open`](Self::open), of tensors.
    pub fn from_tensors(
        config: AdapterConfig,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<Self> {
        let mut adapter = Self::new(config, BTreeMap::new(), BTreeMap::new());
        let mut roles = Vec::new();
        for (name, tensor) in tensors {
            let Some(role) = Role::parse(&name) else {
                return Err(adapter.wrong(&name, "not a tensor of an adapter".into()));
            };
            roles.push((role, tensor));
        }
        adapter.fill(roles)?;
        Ok(adapter)
    }

    fn read(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let mut tensors = Vec::new();
        for key in checkpoint.names() {
            let Some(role) = key.strip_prefix(PREFIX).and_then(Role::parse) else {
                let reason = format!(
                    "not a tensor that can be used: expected {PREFIX}….lora_A.weight, \
                     ….lora_B.weight or a whole module's {PREFIX}….weight"
                );
                return Err(self.wrong(key, reason));
            };
            tensors.push((role, read_f32(checkpoint, key)?));
        }
        self.fill(tensors)
    }

    fn fill(&mut self, tensors: Vec<(Role, Tensor)>) -> Result<()> {
        let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
        for (role, tensor) in tensors {
            match role {
                Role::A(path) => drop(a.insert(path, tensor)),
                Role::B(path) => drop(b.insert(path, tensor)),
                Role::Module(name) => drop(self.modules.insert(name, tensor)),
            }
        }
        for (path, lora_a) in a {
            let Some(lora_b) = b.remove(&path) else {
                let reason = format!("its partner {} is not in the file", key(&path, "lora_B"));
                return Err(self.wrong(&key(&path, "lora_A"), reason));
            };
            let Some(spec) = self.spec(&path)? else { return Err(self.not_a_target(&path)) };
            for (which, tensor, dim) in [("lora_A", &lora_a, 0), ("lora_B", &lora_b, 1)] {
                let shape = tensor.dims();
                if shape.len() != 2 || shape[dim] != spec.rank {
                    let reason = format!(
                        "found {shape:?}, but {CONFIG} has rank {} for it (r or rank_pattern)",
                        spec.rank
                    );
                    return Err(self.wrong(&key(&path, which), reason));
                }
            }
            self.pairs.insert(path, Pair { lora_a, lora_b });
        }
        if let Some(path) = b.keys().next() {
            let reason = format!("its partner {} is not in the file", key(path, "lora_A"));
            return Err(self.wrong(&key(path, "lora_B"), reason));
        }
        Ok(())
    }

    /// Writes the adapter to the folder `dir`, which is created if need be; PEFT reads it. What an earlier adapter had there
    /// is replaced once the new files are complete and on disk.
    ///
    /// # Errors
    /// A disk that is full, or tensors that are not f32.
    pub fn save(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let mut builder = tempfile::Builder::new();
        let partial = builder.prefix(".adapter").tempdir_in(dir).map_err(Error::io(dir))?;
        self.write_weights(&partial.path().join(WEIGHTS))?;
        let settings = format!("{:#}\n", json::write(&self.config));
        write_atomic(&partial.path().join(CONFIG), settings.as_bytes())?;
        // Settings of one adapter never stand beside the tensors of another, whenever the process dies.
        let config = dir.join(CONFIG);
        if config.exists() {
            fs::remove_file(&config).map_err(Error::io(&config))?;
        }
        for name in [WEIGHTS, CONFIG] {
            let path = dir.join(name);
            fs::rename(partial.path().join(name), &path).map_err(Error::io(&path))?;
        }
        #[cfg(unix)] // renames are durable once the directory is
        fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))?;
        Ok(())
    }

    fn write_weights(&self, path: &Path) -> Result<()> {
        let pairs = self.pairs.iter().flat_map(|(path, pair)| {
            [(key(path, "lora_A"), &pair.lora_a), (key(path, "lora_B"), &pair.lora_b)]
        });
        let modules = self.modules.iter().map(|(name, tensor)| (module_key(name), tensor));
        let tensors = Vec::from_iter(pairs.chain(modules));
        let specs = tensors
            .iter()
            .map(|(key, tensor)| TensorSpec::new(key.clone(), Dtype::F32, tensor.dims()));
        let mut writer = SafetensorsWriter::create(path, specs.collect())?;
        for (key, tensor) in &tensors {
            writer.write_tensor(key, tensor)?;
        }
        writer.finish()
    }
}

/// A tensor of finite floats, as f32.
fn read_f32(checkpoint: &Checkpoint, key: &str) -> Result<Tensor> {
    if let Some(info) = checkpoint.get(key)
        && !is_float(info.dtype)
    {
        let reason = format!("found {}, expected F32, F16 or BF16", info.dtype);
        return Err(checkpoint.wrong(key, reason));
    }
    let tensor = checkpoint.read(key)?.to_dtype(DType::F32)?;
    let broken = with_slice::<f32, _>(&tensor, |values| {
        Ok(values.iter().position(|value| !value.is_finite()).map(|at| (at, values[at])))
    })?;
    match broken {
        None => Ok(tensor),
        Some((at, value)) => {
            Err(checkpoint.wrong(key, format!("value {at} is {value}: the adapter is damaged")))
        }
    }
}
