//! A report for people.

use super::{
    Report,
    advice::Advice,
    back_ends::BackEnd,
    cuda::Cuda,
    hub::HubFacts,
    memory::Memory,
    processor::{KernelFacts, Processor},
};
use crate::{limits::Limits, statistics::Bytes};

/// Lines under headings at the left.
#[derive(Default)]
struct Page(String);

impl Page {
    /// `lines`, of which the first stands beside `heading`.
    fn section(&mut self, heading: &str, lines: impl IntoIterator<Item = String>) {
        for (index, line) in lines.into_iter().enumerate() {
            let heading = if index == 0 { heading } else { "" };
            self.0 += format!("{heading:13}{line}").trim_end();
            self.0.push('\n');
        }
    }
}

/// All of it.
pub fn text(report: &Report) -> String {
    let found = &report.found;
    let features = match &report.features[..] {
        [] => "no features".to_owned(),
        features => format!("features {}", features.join(", ")),
    };
    let mut page = Page::default();
    page.section("bitnet", [format!("{}, {features}", report.bitnet)]);
    page.section("processor", processor(&found.processor));
    page.section("kernels", kernels(&found.processor));
    page.section("memory", memory(&found.memory));
    page.section("speed", columns(speed(&found.limits)));
    page.section("hub", hub(&found.hub));
    page.section("cuda", cuda(&found.cuda));
    page.section("back ends", columns(found.back_ends.iter().map(back_end).collect()));
    page.section("settings", report.advice.iter().flat_map(advice));
    page.section("warnings", report.warnings.iter().cloned());
    page.section(
        "problems",
        match &report.problems[..] {
            [] => vec!["none".to_owned()],
            problems => problems.to_vec(),
        },
    );
    page.0
}

/// Cells one below the other: the last column is as long as it is.
fn columns(rows: Vec<Vec<String>>) -> Vec<String> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let line = |row: &Vec<String>| {
        let cells =
            row.iter().enumerate().map(|(column, cell)| format!("{cell:w$}", w = width(column)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn processor(processor: &Processor) -> Vec<String> {
    let Processor { name, system, usable, threads, .. } = processor;
    let name = name.as_deref().unwrap_or("unknown");
    let count = |count: Option<usize>, what: &str| count.map(|count| format!("{count} {what}"));
    let parts = [
        count(processor.processors, "logical processors"),
        count(processor.cores, "cores"),
        count(processor.allowed, "allowed by the affinity"),
        processor.quota.map(|quota| format!("the time of {quota} granted by the control group")),
        Some(format!("{usable} usable")),
    ];
    let parts = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
    let cache =
        processor.cache_bytes.map(|bytes| format!(", last-level cache {}", Bytes(bytes as u64)));
    let load = processor.load_average.map(|load| format!(", load {load}"));
    let (cache, load) = (cache.unwrap_or_default(), load.unwrap_or_default());
    vec![format!("{name}, {system}"), parts, format!("{threads} threads{cache}{load}")]
}

fn kernels(processor: &Processor) -> Vec<String> {
    let row = |kernel: &KernelFacts| {
        let state = match (&kernel.missing[..], processor.kernel == kernel.name) {
            ([], true) if processor.kernel_was_asked_for => "in use, as asked for".into(),
            ([], true) => "in use: the fastest that can run".into(),
            ([], false) => "can run".into(),
            (missing, _) => format!("cannot run: the processor lacks {}", missing.join(", ")),
        };
        vec![kernel.name.to_owned(), state]
    };
    let mut rows = columns(processor.kernels.iter().map(row).collect());
    rows.extend(processor.bf16.then(|| "avx512bf16 for training in bfloat16".to_owned()));
    rows
}

fn memory(memory: &Memory) -> Vec<String> {
    let bytes =
        |bytes: Option<u64>| bytes.map_or("unknown".into(), |bytes| Bytes(bytes).to_string());
    let word = |word: &Option<String>| word.clone().unwrap_or_else(|| "unknown".into());
    let part = match memory.large_part {
        Some(part) => format!("{:.0} % of weights lie in them, as tried", 100. * part),
        None => "not tried, or not told by the system".into(),
    };
    let (total, available) = (bytes(memory.total_bytes), bytes(memory.available_bytes));
    vec![
        format!("{total}, {available} available"),
        format!(
            "huge pages {} (defrag {}): {part}",
            word(&memory.huge_pages),
            word(&memory.huge_page_defrag)
        ),
    ]
}

fn speed(limits: &[Limits]) -> Vec<Vec<String>> {
    if limits.is_empty() {
        return vec![vec!["not measured: too little memory is available".into()]];
    }
    let heading =
        ["threads", "GB/s, 2 MiB pages", "GB/s, 4 KiB pages", "G weights/s, cached", "from memory"];
    let row = |limits: &Limits| {
        let rates = [
            limits.read_large_pages,
            limits.read_small_pages,
            limits.cached_ternary,
            limits.streamed_ternary,
        ];
        let rates = rates.into_iter().map(|rate| format!("{:.1}", rate * 1e-9));
        std::iter::once(limits.threads.to_string()).chain(rates).collect()
    };
    std::iter::once(heading.map(str::to_owned).to_vec()).chain(limits.iter().map(row)).collect()
}

fn hub(hub: &HubFacts) -> Vec<String> {
    let state = match (&hub.not_writable, hub.exists) {
        (Some(reason), _) => format!("not writable: {reason}"),
        (None, true) => "writable".into(),
        (None, false) => "not there yet, can be made".into(),
    };
    let offline = if hub.offline { ", offline" } else { "" };
    let token = if hub.has_token { "a token" } else { "no token" };
    let set = match &hub.variables[..] {
        [] => "no variable is set".to_owned(),
        names => format!("set: {}", names.join(", ")),
    };
    vec![
        format!("{} ({state})", hub.cache.display()),
        format!("{}{offline}, {token}; {set}", hub.endpoint),
    ]
}

fn cuda(cuda: &Cuda) -> Vec<String> {
    let built = match cuda.built {
        true => "in this build",
        false => "not in this build (docs/cuda.md says how to make one)",
    };
    let library = match &cuda.library {
        Some(path) => path.display().to_string(),
        None => "no libcuda.so.1".into(),
    };
    let driver = match &cuda.driver {
        Some(version) => format!("driver {version}"),
        None => "no driver in the kernel".into(),
    };
    let mut lines = vec![format!("{built}; {library}, {driver}")];
    lines.extend(cuda.present.iter().map(|model| format!("present: {model}")));
    lines.extend(cuda.devices.iter().map(|device| {
        let memory = Bytes(device.memory_bytes as u64);
        format!(
            "{}: {}, compute capability {}, {memory}",
            device.name, device.model, device.capability
        )
    }));
    lines.extend(cuda.error.as_ref().map(|error| format!("the driver says: {error}")));
    lines
}

fn back_end(tried: &BackEnd) -> Vec<String> {
    let speed = tried.tokens_per_second.map(|speed| format!("{speed:.0} tokens/s"));
    let mut cells = vec![tried.device.clone(), tried.kernel.into(), tried.result.name().into()];
    cells.extend(speed.or_else(|| tried.detail.clone()));
    cells
}

fn advice(advice: &Advice) -> Vec<String> {
    let Advice { setting, value, command, reason } = advice;
    let first = match command {
        Some(command) => format!("{setting}: {value}: {command}"),
        None => format!("{setting}: {value}, as it is"),
    };
    vec![first, format!("  {reason}")]
}
