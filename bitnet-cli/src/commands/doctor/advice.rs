//! What to set, and why, from what was found.

use bitnet_model::{
    hub::Hub,
    kernels::{KERNEL_VARIABLE, TileFormat, head::HeadFormat},
    kv_cache::KvCache,
    nn::HeadPrecision,
    ops::KvType,
    pretrained::{Precision, Source},
};
use serde::Serialize;

use super::{
    Found,
    back_ends::{BackEnd, Verdict},
    memory::MOST,
};
use crate::{limits::Limits, statistics::Bytes};

/// A setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// `threads`, `kernel`, `device`, `huge pages`, `output head` or `cache`.
    pub setting: &'static str,
    /// What to choose.
    pub value: String,
    /// What to type for it; absent if it is so already.
    pub command: Option<String>,
    /// Why.
    pub reason: String,
}

/// Speeds closer than this part to the best are as good: as far as measurements of the same thing lie apart.
const AS_GOOD: f64 = 0.95;

/// The model that memory should hold, and tokens of its context.
const MODEL: &str = "synthetic:2b-4t";
const CONTEXT: usize = 4096;

/// Bytes for everything but weights, keys and values: activations of a prompt and the program.
const BESIDE: u64 = 300 << 20;

/// On every setting that there is something to say of.
pub fn advise(found: &Found) -> Vec<Advice> {
    let all = [
        threads(found),
        kernel(found),
        device(found),
        huge_pages(found),
        head(found),
        cache(found),
    ];
    all.into_iter().flatten().collect()
}

/// The fewest threads with which weights come from memory about as fast as they can.
fn threads(found: &Found) -> Option<Advice> {
    let speed = |limits: &Limits| limits.streamed_ternary;
    let best = found.limits.iter().map(speed).reduce(f64::max)?;
    let fewest = found.limits.iter().find(|limits| speed(limits) >= AS_GOOD * best)?;
    let now = found.processor.threads;
    let speeds = found
        .limits
        .iter()
        .map(|limits| format!("{:.1} with {}", speed(limits) * 1e-9, limits.threads));
    let speeds = speeds.collect::<Vec<_>>().join(", ");
    Some(Advice {
        setting: "threads",
        value: fewest.threads.to_string(),
        command: (fewest.threads != now).then(|| format!("--threads {}", fewest.threads)),
        reason: format!("G weights/s multiplied from memory: {speeds}"),
    })
}

/// The fastest kernel with the right results.
fn kernel(found: &Found) -> Option<Advice> {
    let good = BackEnd::good(&found.back_ends, true);
    let best = fastest(good.clone())?;
    let active = found.processor.kernel;
    let is_as_good =
        |tried: &&BackEnd| tried.kernel == active && tried.speed() >= AS_GOOD * best.speed();
    let kernel = good.clone().find(is_as_good).unwrap_or(best).kernel;
    let speeds = good.map(|tried| format!("{:.0} {}", tried.speed(), tried.kernel));
    let speeds = speeds.collect::<Vec<_>>().join(", ");
    let asked = match found.processor.kernel_was_asked_for && kernel != active {
        true => format!("; {active} was asked for by --kernel or {KERNEL_VARIABLE}"),
        false => String::new(),
    };
    Some(Advice {
        setting: "kernel",
        value: kernel.into(),
        command: (kernel != active).then(|| format!("--kernel {kernel}")),
        reason: format!("tokens/s of the embedded model: {speeds}{asked}"),
    })
}

fn fastest<'a>(tried: impl Iterator<Item = &'a BackEnd>) -> Option<&'a BackEnd> {
    tried.max_by(|a, b| a.speed().total_cmp(&b.speed()))
}

/// The processor or a device.
fn device(found: &Found) -> Option<Advice> {
    let [cpu, gpu] = [true, false].map(|cpu| fastest(BackEnd::good(&found.back_ends, cpu)));
    let (value, command, reason) = match (cpu, gpu) {
        (Some(cpu), Some(gpu)) => {
            let (on_cpu, on_gpu, device) = (cpu.speed(), gpu.speed(), &gpu.device);
            let speeds = format!(
                "tokens/s of the embedded model: {on_cpu:.0} on the processor, {on_gpu:.0} on {device}"
            );
            let command = format!("--device {device}");
            match on_gpu > on_cpu {
                true => (&device[..], Some(command), speeds),
                false => ("cpu", None, format!("{speeds}; it is small: try yours with {command}")),
            }
        }
        _ if !found.cuda.built && found.cuda.driver.is_some() => {
            let reason =
                "NVIDIA's driver is there, and a build with `--features cuda` could use it";
            ("cpu", None, reason.into())
        }
        _ => ("cpu", None, "there is no other device that this build can use".into()),
    };
    Some(Advice { setting: "device", value: value.into(), command, reason })
}

/// Pages of 2 MiB, in which weights are read fastest.
fn huge_pages(found: &Found) -> Option<Advice> {
    const FOLDER: &str = "/sys/kernel/mm/transparent_hugepage";
    let memory = &found.memory;
    let part = memory.large_part?;
    let write = |word: &str, file: &str| Some(format!("echo {word} | sudo tee {FOLDER}/{file}"));
    let got = format!("{:.0} % of the weights lie in large pages", 100. * part);
    let mode = memory.huge_pages.as_deref();
    let (value, command, reason) = match (mode, memory.huge_page_defrag.as_deref()) {
        _ if part >= MOST => {
            let gain = found.limits.last().map(|limits| {
                let gain = limits.read_large_pages / limits.read_small_pages;
                format!("{got}, read {gain:.2} times as fast as small ones")
            });
            (mode.unwrap_or("granted"), None, gain.unwrap_or(got))
        }
        (Some("never"), _) => {
            let reason = "in large pages weights are read up to 1.9 times as fast; a container has \
                          what its host has";
            ("madvise", write("madvise", "enabled"), reason.into())
        }
        (Some(_), Some("never" | "defer")) => {
            let reason = format!("{got}: none are made where none are free");
            ("defrag madvise", write("madvise", "defrag"), reason)
        }
        (Some(_), _) => {
            let command = "echo 1 | sudo tee /proc/sys/vm/compact_memory".into();
            ("compacted", Some(command), format!("{got}: memory is scattered or scarce"))
        }
        (None, _) => ("unknown", None, format!("{got}, and {FOLDER} does not say why")),
    };
    Some(Advice { setting: "huge pages", value: value.into(), command, reason })
}

/// Whether there is memory for the exact head beside the ternary weights.
fn head(found: &Found) -> Option<Advice> {
    let available = found.memory.available_bytes?;
    let (exact, low) = (needed(false)?, needed(true)?);
    let low_memory = || Some("--low-memory".to_owned());
    let (value, command, fit) = match available {
        bytes if bytes >= exact => ("exact", None, ""),
        bytes if bytes >= low => ("q4", low_memory(), ""),
        _ => ("q4", low_memory(), ": too little even for that"),
    };
    let [exact, low, available] = [exact, low, available].map(Bytes);
    Some(Advice {
        setting: "output head",
        value: value.into(),
        command,
        reason: format!(
            "2B-4T with {CONTEXT} tokens takes {exact}, with --low-memory {low}; {available} are \
             available{fit}"
        ),
    })
}

/// Bytes that the model takes, as it is by default or with `--low-memory`.
fn needed(low: bool) -> Option<u64> {
    let mut source = Source::open(MODEL, Precision::default(), &Hub::from_env()).ok()?;
    let kv_type = if low { KvType::Int8 } else { KvType::default() };
    if low {
        source.lm_head = HeadPrecision::Quantized(HeadFormat::Q4);
    }
    source.tile_format = Some(if low { TileFormat::Trits } else { TileFormat::TwoBit });
    let cache = CONTEXT * KvCache::token_bytes(&source.config, kv_type);
    Some(source.weight_bytes(true).total() + cache as u64 + BESIDE)
}

/// A cache that can be written.
fn cache(found: &Found) -> Option<Advice> {
    let reason = found.hub.not_writable.as_ref()?;
    Some(Advice {
        setting: "cache",
        value: "a folder that you can write".into(),
        command: Some("export HF_HOME=FOLDER".into()),
        reason: format!("models of the Hub cannot be kept: {reason}"),
    })
}

/// What is wrong: of what results were computed wrongly or not at all.
pub fn problems(back_ends: &[BackEnd]) -> Vec<String> {
    let wrong = back_ends.iter().filter(|tried| !tried.result.is_good());
    let tell = |tried: &BackEnd| {
        let detail = tried.detail.as_deref().unwrap_or_default();
        let (name, device) = (tried.kernel, &tried.device);
        let avoid = match (&device[..], name) {
            ("cpu", "scalar") => String::new(),
            ("cpu", _) => "; until it is repaired, take another one with --kernel".into(),
            _ => "; until it is repaired, compute with --device cpu".into(),
        };
        match tried.result {
            Verdict::Unknown => format!("{name} on {device} could not be compared with scalar"),
            Verdict::Differ => {
                format!("{name} on {device} computes other results than scalar: {detail}{avoid}")
            }
            _ => format!("{name} on {device} failed: {detail}{avoid}"),
        }
    };
    wrong.map(tell).collect()
}

/// What is not as it should be, but ends nothing.
pub fn warnings(found: &Found) -> Vec<String> {
    let (processor, cuda) = (&found.processor, &found.cuda);
    let (threads, usable) = (processor.threads, processor.usable);
    let load = processor.load_average.filter(|&load| load > 0.5);
    let unusable = cuda.built && cuda.devices.is_empty();
    let error = cuda.error.as_deref().unwrap_or("there is none");
    let all = [
        (threads > usable).then(|| {
            format!(
                "{threads} threads wait for one another on {usable} processors: --threads {usable}"
            )
        }),
        load.map(|load| format!("the load was {load}: figures may be too low")),
        unusable.then(|| format!("this build is for CUDA, but no device can be used: {error}")),
        found
            .hub
            .not_writable
            .as_ref()
            .map(|reason| format!("no model can be downloaded: {reason}")),
    ];
    all.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        commands::doctor::{cuda::Cuda, hub::HubFacts, memory::Memory, processor::Processor},
        machine::Machine,
    };

    fn back_end(device: &str, kernel: &'static str, result: Verdict, speed: f64) -> BackEnd {
        let detail = (!result.is_good()).then(|| "why".to_owned());
        let tokens_per_second = Some(speed);
        BackEnd { device: device.into(), kernel, result, detail, tokens_per_second }
    }

    /// A machine of two processors without any file of the system, where all is as it should be.
    fn found() -> Found {
        let nowhere = tempfile::tempdir().unwrap();
        let machine = Machine::under(nowhere.path());
        let mut processor = Processor::examine(nowhere.path(), &machine, false);
        (processor.kernel, processor.threads, processor.usable) = ("avx2", 2, 2);
        let limits = |threads, streamed_ternary| Limits {
            threads,
            read_large_pages: 3e9,
            read_small_pages: 2e9,
            multiply: 1.,
            cached_ternary: 1.,
            streamed_ternary,
        };
        let memory = Memory {
            total_bytes: Some(16 << 30),
            available_bytes: Some(8 << 30),
            huge_pages: Some("madvise".into()),
            huge_page_defrag: Some("madvise".into()),
            large_part: Some(1.),
        };
        let hub = HubFacts {
            cache: "/cache".into(),
            exists: true,
            not_writable: None,
            endpoint: "https://hub".into(),
            offline: true,
            has_token: false,
            variables: Vec::new(),
        };
        let back_ends = vec![
            back_end("cpu", "avx2", Verdict::Equal, 96.),
            back_end("cpu", "scalar", Verdict::Reference, 100.),
        ];
        let limits = vec![limits(1, 5e9), limits(2, 10e9)];
        Found { processor, memory, limits, hub, cuda: Cuda::default(), back_ends }
    }

    fn of<'a>(advice: &'a [Advice], setting: &str) -> &'a Advice {
        advice.iter().find(|advice| advice.setting == setting).unwrap()
    }

    /// Value and command for a setting.
    fn advised(found: &Found, setting: &str) -> (String, Option<String>) {
        let advice = advise(found);
        let advice = of(&advice, setting);
        (advice.value.clone(), advice.command.clone())
    }

    #[test]
    fn where_all_is_well_nothing_is_to_be_typed() {
        let found = found();
        for (setting, value) in [
            ("threads", "2"),
            ("kernel", "avx2"), // as good as the fastest
            ("device", "cpu"),
            ("huge pages", "madvise"),
            ("output head", "exact"),
        ] {
            assert_eq!(advised(&found, setting), (value.to_owned(), None));
        }
        assert!(of(&advise(&found), "huge pages").reason.contains("1.50 times"));
        assert_eq!((warnings(&found), problems(&found.back_ends)), (vec![], vec![]));
    }

    #[test]
    fn what_is_measured_decides() {
        let mut found = found();
        found.limits[0].streamed_ternary = 9.6e9;
        assert_eq!(advised(&found, "threads"), ("1".into(), Some("--threads 1".into())));
        found.limits.clear();
        assert!(advise(&found).iter().all(|advice| advice.setting != "threads"));

        found.back_ends[0].tokens_per_second = Some(94.);
        let other = ("scalar".to_owned(), Some("--kernel scalar".to_owned()));
        assert_eq!(advised(&found, "kernel"), other);
        found.back_ends[0] = back_end("cpu", "avx2", Verdict::Differ, 500.);
        assert_eq!(advised(&found, "kernel"), other);

        found.back_ends.push(back_end("cuda:0", "avx2", Verdict::Equal, 99.));
        assert_eq!(advised(&found, "device"), ("cpu".into(), None));
        found.back_ends.push(back_end("cuda:1", "avx2", Verdict::Equal, 101.));
        assert_eq!(advised(&found, "device"), ("cuda:1".into(), Some("--device cuda:1".into())));
    }

    #[test]
    fn memory_decides() {
        let mut found = found();
        found.memory.available_bytes = Some(5 << 28);
        assert_eq!(advised(&found, "output head"), ("q4".into(), Some("--low-memory".into())));
        assert!(!of(&advise(&found), "output head").reason.contains("too little"));
        found.memory.available_bytes = Some(100 << 20);
        assert!(of(&advise(&found), "output head").reason.contains("too little"));

        found.memory.large_part = Some(0.5);
        for (mode, defrag, command) in [
            (
                "never",
                "madvise",
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
            ),
            (
                "always",
                "never",
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/defrag",
            ),
            ("madvise", "madvise", "echo 1 | sudo tee /proc/sys/vm/compact_memory"),
        ] {
            found.memory.huge_pages = Some(mode.into());
            found.memory.huge_page_defrag = Some(defrag.into());
            assert_eq!(advised(&found, "huge pages").1.as_deref(), Some(command));
        }
        found.memory.huge_pages = None;
        assert_eq!(advised(&found, "huge pages"), ("unknown".into(), None));
    }

    #[test]
    fn what_is_wrong_is_told() {
        let mut found = found();
        found.processor.threads = 3;
        found.processor.load_average = Some(2.5);
        found.hub.not_writable = Some("/cache: no".into());
        found.cuda = Cuda { built: true, error: Some("no driver".into()), ..Cuda::default() };
        let warnings = warnings(&found);
        for (warning, part) in warnings.iter().zip(["--threads 2", "2.5", "no driver", "/cache"]) {
            assert!(warning.contains(part), "{warning}");
        }
        assert_eq!(warnings.len(), 4);
        assert!(advised(&found, "cache").1.unwrap().contains("HF_HOME"));

        let wrong = [
            back_end("cpu", "avx2", Verdict::Differ, 1.),
            back_end("cpu", "scalar", Verdict::Failed, 1.),
            back_end("cuda:0", "avx2", Verdict::Unknown, 1.),
        ];
        let problems = problems(&wrong);
        for (problem, part) in problems.iter().zip(["take another one", "failed: why", "compared"])
        {
            assert!(problem.contains(part), "{problem}");
        }
        assert_eq!(problems.len(), 3);
    }
}
