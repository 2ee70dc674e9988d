//! The machine that computes, for whoever reads its figures later.

use std::{fs, num::NonZeroUsize, path::Path};

use bitnet_model::kernels::{self, Kernel};
use serde::Serialize;

use crate::statistics::proc_field;

/// What can be told about this machine; a field that the system does not tell is absent.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// As the processor names itself.
    pub processor: Option<String>,
    /// Those this process may use.
    pub processors: usize,
    /// Instruction sets there are kernels for, fastest first.
    pub kernels: Vec<&'static str>,
    /// Bytes of memory.
    pub memory_bytes: Option<u64>,
    /// Bytes of the last-level cache.
    pub cache_bytes: Option<usize>,
    /// When transparent huge pages are granted: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// Operating system and architecture.
    pub system: String,
    /// Processes that wanted to run, on average over the minute before the run.
    pub load_average: Option<f64>,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        Self::under(Path::new("/"))
    }

    /// This one, with the system's files below `root`.
    pub fn under(root: &Path) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let cpuinfo = read("proc/cpuinfo");
        let processor = cpuinfo.as_deref().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        Self {
            processor,
            processors: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            kernels: kernels::available().map(Kernel::name).collect(),
            memory_bytes: read("proc/meminfo").and_then(|text| proc_field(&text, "MemTotal:")),
            cache_bytes: last_level_cache(root),
            huge_pages: read("sys/kernel/mm/transparent_hugepage/enabled")
                .and_then(|text| chosen(&text)),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            load_average: read("proc/loadavg")
                .and_then(|text| text.split_whitespace().next()?.parse().ok()),
        }
    }
}

/// The choice in a list as the kernel writes them: `always [madvise] never`.
pub fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Bytes of the largest cache that the first processor reaches; the system's files lie below `root`.
pub fn last_level_cache(root: &Path) -> Option<usize> {
    let folder = root.join("sys/devices/system/cpu/cpu0/cache");
    let caches = fs::read_dir(folder).ok()?.flatten();
    let sizes = caches.filter_map(|cache| fs::read_to_string(cache.path().join("size")).ok());
    sizes.filter_map(|size| cache_size(&size)).max()
}

/// `1024K` or `32M`.
fn cache_size(text: &str) -> Option<usize> {
    let text = text.trim();
    let (number, shift) = match (text.strip_suffix('K'), text.strip_suffix('M')) {
        (Some(kib), _) => (kib, 10),
        (_, Some(mib)) => (mib, 20),
        _ => (text, 0),
    };
    Some(number.parse::<usize>().ok()? << shift)
}

/// Bytes that this process may still take: what the system has available, within the limit of its control group.
/// `None` where the system does not say. Its files lie below `root`.
pub fn available_memory(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let system = proc_field(&meminfo, "MemAvailable:")?;
    Some(system.min(group_limit(root).unwrap_or(u64::MAX)))
}

/// What the control group of a container leaves, version 2 or 1; in containers its folder is the root of the tree.
fn group_limit(root: &Path) -> Option<u64> {
    let number = |path: &str| -> Option<u64> {
        fs::read_to_string(root.join("sys/fs/cgroup").join(path)).ok()?.trim().parse().ok()
    };
    let left = |limit: &str, used: &str| Some(number(limit)?.saturating_sub(number(used)?));
    left("memory.max", "memory.current")
        .or_else(|| left("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_caches() {
        assert_eq!(cache_size("1024K\n"), Some(1 << 20));
        assert_eq!(cache_size("32M"), Some(32 << 20));
        assert_eq!(cache_size("64"), Some(64));
        assert_eq!(cache_size("?"), None);
    }
}
