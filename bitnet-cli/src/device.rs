//! Where a model computes.

use std::str::FromStr;

use anyhow::{Context, bail};
use candle_core::{Device, DeviceLocation, utils::cuda_is_available};

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor.
    #[default]
    Cpu,
    /// NVIDIA's device of this number.
    Cuda(usize),
    /// The first device of this build that answers, or the processor.
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> anyhow::Result<Self> {
        Ok(match name.split_once(':') {
            None if name == "cpu" => Self::Cpu,
            None if name == "cuda" => Self::Cuda(0),
            None if name == "auto" => Self::Auto,
            Some(("cuda", index)) => Self::Cuda(
                index.parse().with_context(|| format!("`{index}` is no number of a device"))?,
            ),
            None if name == "metal" => bail!(
                "Metal is not implemented: compute on `cpu` (docs/metal.md says what is missing)"
            ),
            _ => bail!("give cpu, cuda, cuda:N or auto"),
        })
    }
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    /// A build without it, or a device that is not there.
    pub fn open(self) -> anyhow::Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(Device::cuda_if_available(0).unwrap_or(Device::Cpu)),
            Self::Cuda(_) if !cuda_is_available() => {
                bail!("--device cuda: this build computes on `cpu` only; build it with `--features cuda` (docs/cuda.md)")
            }
            Self::Cuda(index) => Device::new_cuda(index)
                .with_context(|| format!("--device cuda:{index} cannot be used; `nvidia-smi` lists the devices and the driver")),
        }
    }
}

/// What `--device` calls it.
pub fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
        DeviceLocation::Cpu => "cpu".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        let parse = |name: &str| name.parse::<DeviceChoice>().ok();
        assert_eq!(parse("cpu"), Some(DeviceChoice::Cpu));
        assert_eq!(parse("cuda"), Some(DeviceChoice::Cuda(0)));
        assert_eq!(parse("cuda:3"), Some(DeviceChoice::Cuda(3)));
        assert_eq!(parse("auto"), Some(DeviceChoice::Auto));
        let metal = "metal".parse::<DeviceChoice>().unwrap_err().to_string();
        assert!(metal.contains("not implemented"), "{metal}");
        for wrong in ["", "tpu", "cuda:", "cuda:-1", "cpu:0"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_for_the_processor_says_so() {
        assert!(DeviceChoice::Auto.open().is_ok_and(|device| device.is_cpu()));
        let error = DeviceChoice::Cuda(0).open().map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }
}
