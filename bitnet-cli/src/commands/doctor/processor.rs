//! The processor: how many of them this process may use, and which kernels they can run.

use std::{collections::BTreeSet, fs, num::NonZeroUsize, path::Path, thread};

use bitnet_model::{
    kernels::{self, Bf16Panels, instruction_sets},
    threads,
};
use serde::Serialize;

use crate::machine::Machine;

/// What computes.
#[derive(Clone, Debug, Serialize)]
pub struct Processor {
    /// As it names itself.
    pub name: Option<String>,
    /// Operating system and architecture.
    pub system: String,
    /// Logical processors there are.
    pub processors: Option<usize>,
    /// Cores they belong to.
    pub cores: Option<usize>,
    /// Those that the affinity of this process allows.
    pub allowed: Option<usize>,
    /// How many of them its control group grants the time of.
    pub quota: Option<f64>,
    /// What follows of that: threads that can compute at once.
    pub usable: usize,
    /// Threads that compute unless told otherwise.
    pub threads: usize,
    /// Bytes of the last-level cache.
    pub cache_bytes: Option<usize>,
    /// Processes that wanted to run, on average over the last minute.
    pub load_average: Option<f64>,
    /// The kernel in use.
    pub kernel: &'static str,
    /// Whether it was asked for; otherwise it is the fastest of those that can run.
    pub kernel_was_asked_for: bool,
    /// All of this architecture, fastest first.
    pub kernels: Vec<KernelFacts>,
    /// Whether there are instructions for bfloat16, which training can take.
    pub bf16: bool,
}

/// A kernel and why it can or cannot run.
#[derive(Clone, Debug, Serialize)]
pub struct KernelFacts {
    /// Its name.
    pub name: &'static str,
    /// Instructions that it needs.
    pub needs: Vec<&'static str>,
    /// Those of them that are not there.
    pub missing: Vec<&'static str>,
}

impl Processor {
    /// This one; the system's files lie below `root`.
    pub fn examine(root: &Path, machine: &Machine, kernel_was_asked_for: bool) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let cpuinfo = read("proc/cpuinfo").unwrap_or_default();
        let kernels = instruction_sets().map(|set| KernelFacts {
            name: set.kernel,
            needs: set.needs,
            missing: set.missing,
        });
        Self {
            name: machine.processor.clone(),
            system: machine.system.clone(),
            processors: Some(fields(&cpuinfo, "processor").count()).filter(|&count| count > 0),
            cores: cores(&cpuinfo),
            allowed: read("proc/self/status").and_then(|status| {
                let list = fields(&status, "Cpus_allowed_list").next()?;
                count_of_list(list)
            }),
            quota: quota(root),
            usable: thread::available_parallelism().map_or(1, NonZeroUsize::get),
            threads: threads::count(),
            cache_bytes: machine.cache_bytes,
            load_average: machine.load_average,
            kernel: kernels::active().name(),
            kernel_was_asked_for,
            kernels: kernels.collect(),
            bf16: Bf16Panels::new().is_some(),
        }
    }
}

/// Values of the lines `name : value`.
fn fields<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.filter(move |(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// Distinct cores of all sockets; not every architecture tells them.
fn cores(cpuinfo: &str) -> Option<usize> {
    let sockets = fields(cpuinfo, "physical id");
    let all: BTreeSet<_> = sockets.zip(fields(cpuinfo, "core id")).collect();
    Some(all.len()).filter(|&count| count > 0)
}

/// How many numbers `0-3,8` are.
fn count_of_list(list: &str) -> Option<usize> {
    let count = |part: &str| -> Option<usize> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    };
    list.split(',').map(count).sum()
}

/// Processors whose time the control group and those above it grant, version 2 or 1; `None` if that is not limited.
fn quota(root: &Path) -> Option<f64> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let groups = root.join("sys/fs/cgroup");
    let ratio = |quota: &str, period: &str| -> Option<f64> {
        Some(quota.trim().parse::<u64>().ok()? as f64 / period.trim().parse::<u64>().ok()? as f64)
    };
    let own = read(&root.join("proc/self/cgroup")).unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let of_group = |group: &Path| -> Option<f64> {
        let text = read(&groups.join(group).join("cpu.max"))?;
        let (quota, period) = text.trim().split_once(' ')?;
        ratio(quota, period) // `max 100000` is no number
    };
    let first_version = || {
        let file = |name: &str| read(&groups.join("cpu").join(name));
        ratio(&file("cpu.cfs_quota_us")?, &file("cpu.cfs_period_us")?) // −1 is no limit
    };
    Path::new(own).ancestors().filter_map(of_group).reduce(f64::min).or_else(first_version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(count_of_list("0-3,8"), Some(5));
        assert_eq!(count_of_list("7"), Some(1));
        for wrong in ["", "3-1", "a", "1,"] {
            assert_eq!(count_of_list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn cores_are_counted_once() {
        let threads = ["0 0", "0 1", "1 0", "0 0"].map(|ids| {
            let (socket, core) = ids.split_once(' ').unwrap();
            format!("processor\t: 0\nphysical id\t: {socket}\ncore id\t\t: {core}\n\n")
        });
        assert_eq!(cores(&threads.concat()), Some(3));
        assert_eq!(cores("processor : 0\nBogoMIPS : 48.00\n"), None);
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(quota(root.path()), None);
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n");
        write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
        assert_eq!(quota(root.path()), Some(3.));
        write("proc/self/cgroup", "0::/user/job\n");
        write("sys/fs/cgroup/user/job/cpu.max", "max 100000\n");
        assert_eq!(quota(root.path()), Some(3.));
        write("sys/fs/cgroup/user/cpu.max", "150000 100000\n");
        write("sys/fs/cgroup/cpu.max", "400000 100000\n");
        assert_eq!(quota(root.path()), Some(1.5));
    }
}
