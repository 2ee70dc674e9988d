//! What this process takes of the machine, where the system tells (Linux).

use std::{fs, time::Instant};

use crate::statistics::proc_field;

/// Ticks of a CPU clock in a second, on every Linux that Rust runs on.
const TICKS: f64 = 100.;

/// Bytes of memory.
pub fn resident_bytes() -> Option<u64> {
    proc_field(&fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// Seconds of all cores so far.
pub fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses; fields 14 and 15 are the ticks of programs and of the system for them.
    let (_, fields) = stat.rsplit_once(')')?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    Some(ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS)
}

/// How busy the cores have been between two looks.
#[derive(Default)]
pub struct Cpu {
    last: Option<(Instant, f64)>,
}

impl Cpu {
    /// Percent of one core since the last look; none at the first.
    pub fn look(&mut self, now: Instant) -> Option<f64> {
        let seconds = cpu_seconds()?;
        let (then, before) = self.last.replace((now, seconds))?;
        let passed = (now - then).as_secs_f64();
        (passed > 0.).then(|| (1000. * (seconds - before) / passed).round() / 10.)
    }
}
