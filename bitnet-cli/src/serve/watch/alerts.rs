//! Alerts: values that are beyond what the operator allows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::windows::Window;
use crate::openai::now;

/// From when on there is an alert; none without a threshold.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Alerts (in /stats, /metrics and the log; over the last minute)")]
pub struct Thresholds {
    /// More memory than so many MiB
    #[arg(long, value_name = "MIB")]
    pub alert_memory: Option<f64>,
    /// Busier than so many percent of one core
    #[arg(long, value_name = "PERCENT")]
    pub alert_cpu: Option<f64>,
    /// Fewer new tokens a second while something runs
    #[arg(long, value_name = "N")]
    pub alert_tokens_per_second: Option<f64>,
    /// A larger part of requests failing on our side: 0 to 1
    #[arg(long, value_name = "PART")]
    pub alert_error_rate: Option<f64>,
    /// A longer time to the first token, 99th percentile, in ms
    #[arg(long, value_name = "MS")]
    pub alert_first_token: Option<f64>,
    /// A longer time between tokens, 99th percentile, in ms
    #[arg(long, value_name = "MS")]
    pub alert_inter_token: Option<f64>,
}

/// A value beyond its threshold.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alert {
    pub name: &'static str,
    pub value: f64,
    pub threshold: f64,
    /// Seconds since 1970.
    pub since: u64,
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Readings<'a> {
    pub window: &'a Window,
    pub resident_bytes: Option<u64>,
    pub cpu_percent: Option<f64>,
    pub running: usize,
}

/// The alerts there are.
#[derive(Default)]
pub struct Alerts {
    thresholds: Thresholds,
    raised: BTreeMap<&'static str, Alert>,
}

impl Alerts {
    /// None yet.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds, raised: BTreeMap::new() }
    }

    /// Raises and clears alerts, and logs that.
    pub fn look(&mut self, readings: Readings<'_>) {
        let (Readings { window, running, .. }, limits) = (readings, self.thresholds);
        let mib = readings.resident_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
        let tokens = (running > 0).then_some(window.new_tokens_per_second);
        let above = |value: Option<f64>, threshold: Option<f64>| {
            Option::zip(value, threshold).map(|(value, limit)| (value, limit, value > limit))
        };
        let below = Option::zip(tokens, limits.alert_tokens_per_second);
        let below = below.map(|(value, limit)| (value, limit, value < limit));
        let errors = (window.requests > 0).then_some(window.error_rate);
        let looks = [
            ("memory", above(mib, limits.alert_memory)),
            ("cpu", above(readings.cpu_percent, limits.alert_cpu)),
            ("tokens_per_second", below),
            ("error_rate", above(errors, limits.alert_error_rate)),
            ("first_token", above(window.ttft_ms.p99, limits.alert_first_token)),
            ("inter_token", above(window.inter_token_ms.p99, limits.alert_inter_token)),
        ];
        for (name, look) in looks {
            self.set(name, look.filter(|look| look.2).map(|(value, limit, _)| (value, limit)));
        }
    }

    fn set(&mut self, name: &'static str, found: Option<(f64, f64)>) {
        match (found, self.raised.get_mut(name)) {
            (Some((value, _)), Some(alert)) => alert.value = value,
            (Some((value, threshold)), None) => {
                tracing::warn!(name, value, threshold, "alert");
                self.raised.insert(name, Alert { name, value, threshold, since: now() });
            }
            (None, Some(_)) => {
                tracing::warn!(name, "alert is over");
                self.raised.remove(name);
            }
            (None, None) => {}
        }
    }

    /// Those there are now.
    pub fn raised(&self) -> Vec<Alert> {
        self.raised.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::serve::watch::windows::Windows;

    #[test]
    fn alerts_are_raised_and_cleared() {
        let now = Instant::now();
        let thresholds = Thresholds {
            alert_memory: Some(1.),
            alert_tokens_per_second: Some(5.),
            ..Thresholds::default()
        };
        let (window, mut alerts) = (Windows::new(now).shortest(now), Alerts::new(thresholds));
        let mut names = |resident_bytes, running| {
            let cpu_percent = Some(1e9);
            alerts.look(Readings { window: &window, resident_bytes, cpu_percent, running });
            Vec::from_iter(alerts.raised().iter().map(|alert| alert.name))
        };
        assert_eq!(names(Some(1 << 20), 0), [] as [&str; 0]);
        assert_eq!(names(Some(3 << 20), 1), ["memory", "tokens_per_second"]);
        assert_eq!(names(None, 1), ["tokens_per_second"]);
        assert_eq!(names(Some(3 << 20), 0), ["memory"]);
    }
}
