//! What happened lately: counts and percentiles over the last minute, five minutes and hour, in constant memory.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::Serialize;

/// The windows that are shown.
const WINDOWS: [u64; 3] = [60, 300, 3600];
/// Events are counted by slots of this length, as many as the longest window needs.
const SLOT_SECONDS: u64 = 5;
const SLOTS: usize = (3600 / SLOT_SECONDS) as usize;

/// A duration falls into one of these; each goes to 1.12 times where it starts, so that a percentile is exact to 6 %. The last
/// one starts at 0.1 ms · 1.12¹²⁷ = 178 s.
const BUCKETS: usize = 128;
const FIRST_BUCKET_SECONDS: f64 = 1e-4;
const GROWTH: f64 = 1.12;

/// How many durations were how long.
#[derive(Clone)]
struct Durations([u32; BUCKETS]);

impl Default for Durations {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Durations {
    fn push(&mut self, duration: Duration) {
        let times = duration.as_secs_f64() / FIRST_BUCKET_SECONDS;
        let bucket = if times > 1. { (times.ln() / GROWTH.ln()) as usize } else { 0 };
        let count = &mut self.0[bucket.min(BUCKETS - 1)];
        *count = count.saturating_add(1);
    }

    fn add(&mut self, other: &Self) {
        let pairs = self.0.iter_mut().zip(other.0);
        pairs.for_each(|(sum, count)| *sum = sum.saturating_add(count));
    }

    /// The duration that this part of all does not exceed, in milliseconds: the middle of its bucket.
    fn percentile(&self, part: f64) -> Option<f64> {
        let all: u64 = self.0.iter().map(|count| u64::from(*count)).sum();
        let rank = (all as f64 * part).ceil().max(1.) as u64;
        let mut sum = 0;
        let bucket = self.0.iter().position(|count| {
            sum += u64::from(*count);
            sum >= rank
        })?;
        let ms = 1000. * FIRST_BUCKET_SECONDS * GROWTH.powf(bucket as f64 + 0.5);
        Some((ms * 100.).round() / 100.)
    }

    fn percentiles(&self) -> Percentiles {
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|part| self.percentile(part));
        Percentiles { p50, p90, p99 }
    }
}

/// Durations in milliseconds; null where there were none.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
}

#[derive(Clone, Default)]
struct Slot {
    number: u64,
    requests: u64,
    errors: u64,
    prompt_tokens: u64,
    new_tokens: u64,
    first_token: Durations,
    next_token: Durations,
    request: Durations,
}

/// What happened in a window.
#[derive(Clone, Debug, Serialize)]
pub struct Window {
    pub seconds: u64,
    pub requests: u64,
    pub errors: u64,
    /// Requests that failed on our side, of all.
    pub error_rate: f64,
    pub requests_per_second: f64,
    pub prompt_tokens_per_second: f64,
    pub new_tokens_per_second: f64,
    pub ttft_ms: Percentiles,
    pub inter_token_ms: Percentiles,
    pub request_ms: Percentiles,
}

/// The last hour.
pub struct Windows {
    start: Instant,
    slots: VecDeque<Slot>,
}

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub enum Happening {
    /// A request is done; whether it failed on our side, and what it took.
    Request { is_error: bool, took: Duration },
    /// So many tokens of a prompt were taken in.
    Prompt(usize),
    /// A first token came after so long.
    FirstToken(Duration),
    /// A further token came after so long.
    NextToken(Duration),
}

impl Windows {
    /// Nothing yet.
    pub fn new(start: Instant) -> Self {
        Self { start, slots: VecDeque::new() }
    }

    /// Takes what happened at `now`.
    pub fn push(&mut self, now: Instant, happening: Happening) {
        let number = self.number(now);
        if self.slots.back().is_none_or(|slot| slot.number < number) {
            self.slots.push_back(Slot { number, ..Slot::default() });
            if self.slots.len() > SLOTS {
                self.slots.pop_front();
            }
        }
        let Some(slot) = self.slots.back_mut() else { return };
        match happening {
            Happening::Request { is_error, took } => {
                slot.requests += 1;
                slot.errors += u64::from(is_error);
                slot.request.push(took);
            }
            Happening::Prompt(tokens) => slot.prompt_tokens += tokens as u64,
            Happening::FirstToken(after) => {
                slot.new_tokens += 1;
                slot.first_token.push(after);
            }
            Happening::NextToken(after) => {
                slot.new_tokens += 1;
                slot.next_token.push(after);
            }
        }
    }

    /// All windows, up to `now`.
    pub fn at(&self, now: Instant) -> Vec<Window> {
        WINDOWS.map(|seconds| self.window(seconds, now)).into()
    }

    /// The shortest window.
    pub fn shortest(&self, now: Instant) -> Window {
        self.window(WINDOWS[0], now)
    }

    fn window(&self, seconds: u64, now: Instant) -> Window {
        let first = (self.number(now) + 1).saturating_sub(seconds / SLOT_SECONDS);
        let mut sum = Slot::default();
        for slot in self.slots.iter().rev().take_while(|slot| slot.number >= first) {
            sum.requests += slot.requests;
            sum.errors += slot.errors;
            sum.prompt_tokens += slot.prompt_tokens;
            sum.new_tokens += slot.new_tokens;
            sum.first_token.add(&slot.first_token);
            sum.next_token.add(&slot.next_token);
            sum.request.add(&slot.request);
        }
        let begun = Duration::from_secs(first * SLOT_SECONDS);
        let length = (now - self.start).saturating_sub(begun).as_secs_f64().max(1.);
        let rate = |count: u64| (1000. * count as f64 / length).round() / 1000.;
        Window {
            seconds,
            requests: sum.requests,
            errors: sum.errors,
            error_rate: sum.errors as f64 / sum.requests.max(1) as f64,
            requests_per_second: rate(sum.requests),
            prompt_tokens_per_second: rate(sum.prompt_tokens),
            new_tokens_per_second: rate(sum.new_tokens),
            ttft_ms: sum.first_token.percentiles(),
            inter_token_ms: sum.next_token.percentiles(),
            request_ms: sum.request.percentiles(),
        }
    }

    fn number(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / SLOT_SECONDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_close_and_old_slots_leave() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut windows = Windows::new(start);
        for ms in 1..=100 {
            windows.push(at(1), Happening::FirstToken(Duration::from_millis(ms)));
        }
        windows.push(at(2), Happening::Request { is_error: true, took: Duration::from_secs(9999) });
        windows.push(at(30), Happening::Request { is_error: false, took: Duration::ZERO });
        let minute = windows.shortest(at(40));
        assert_eq!((minute.requests, minute.errors, minute.error_rate), (2, 1, 0.5));
        assert_eq!((minute.new_tokens_per_second, minute.inter_token_ms.p50), (2.5, None));
        for (found, exact) in [(minute.ttft_ms.p50, 50.), (minute.ttft_ms.p99, 99.)] {
            let ratio = found.unwrap() / exact;
            assert!((0.94..1.06).contains(&ratio), "{ratio}");
        }
        let all = windows.at(at(70));
        assert_eq!((all[0].requests, all[1].requests, all[2].requests), (1, 2, 2));
        assert_eq!(all[0].ttft_ms.p50, None);
        for second in 0..8000 {
            windows.push(at(second), Happening::Prompt(1));
        }
        assert_eq!(windows.slots.len(), SLOTS);
        assert!(windows.at(at(7999)).iter().all(|window| window.prompt_tokens_per_second > 0.99));
    }
}
