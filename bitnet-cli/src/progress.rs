//! Progress on stderr, and numbers as people read them.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::args::Global;

/// A bar over `len` steps, drawn by the indicatif template; hidden by `--quiet` and when stderr is no
/// terminal.
pub fn bar(global: &Global, len: usize, template: &str) -> ProgressBar {
    let target = match global.quiet {
        true => ProgressDrawTarget::hidden(),
        false => ProgressDrawTarget::stderr(),
    };
    ProgressBar::with_draw_target(Some(len as u64), target).with_style(style(template))
}

/// The look of a bar that the indicatif template draws.
pub fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Bytes with a decimal prefix and three digits: `1.18 GB`.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        _ => format!("{}B", scaled(bytes as f64, "k")),
    }
}

/// A count with a decimal suffix and three digits: `2.41 B`.
pub fn count(count: u64) -> String {
    match count {
        0..1000 => count.to_string(),
        _ => scaled(count as f64, "K").replace('G', "B"),
    }
}

/// `value`, at least 1000, in the largest unit that leaves a whole digit.
fn scaled(value: f64, thousand: &str) -> String {
    let units = [(1e3, thousand), (1e6, "M"), (1e9, "G"), (1e12, "T")];
    // Three digits are shown, so what rounds up to 1000 belongs to the next unit.
    let fits = |(unit, _): &(f64, &str)| value / unit < 999.5;
    let (unit, name) = units.into_iter().find(fits).unwrap_or(units[3]);
    let value = value / unit;
    let digits = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {name}")
}

/// Seconds as `h:mm:ss` or `m:ss`.
pub fn duration(duration: std::time::Duration) -> String {
    let seconds = duration.as_secs();
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_996, "10.0 kB"),
            (999_499, "999 kB"),
            (999_600, "1.00 MB"),
            (1_178_623_104, "1.18 GB"),
            (5_000_000_000_000_000, "5000 TB"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
        assert_eq!(count(2_412_820_480), "2.41 B");
        assert_eq!(count(328_335_360), "328 M");
        assert_eq!(count(12), "12");
    }

    #[test]
    fn durations() {
        assert_eq!(duration(Duration::from_secs(59)), "0:59");
        assert_eq!(duration(Duration::from_secs(3_600 * 25 + 61)), "25:01:01");
    }
}
