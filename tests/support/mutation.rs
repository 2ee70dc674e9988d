//! Valid inputs, changed at random until a reader panics, hangs or a time is over: what a fuzzer does, without its compiler.

use std::{
    any::Any,
    cell::Cell,
    env, fs,
    panic::{self, AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Once,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

/// Inputs of a run that has no time of its own.
const INPUTS: usize = 1000;
/// No input of these sizes takes a thousandth of it.
const SLOW: Duration = Duration::from_secs(10);

thread_local! {
    /// Whether a panic of this thread is not worth a word: a reader may catch those of other people's parsers, and what it does
    /// not catch is told with its input.
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Keeps panics of [`SILENT`] threads from being printed.
fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                print(info);
            }
        }));
    });
}

/// Gives `read` changed copies of `seeds`: 1000, or as many as fit into `BITNET_FUZZ_SECONDS`. `BITNET_FUZZ_SEED` chooses others.
/// `read` tells whether it took the input; all of `seeds` must be taken.
///
/// # Panics
/// At an input at which `read` does, or takes too long, which then lies in a file.
pub fn hammer(target: &str, seeds: &[Vec<u8>], read: impl Fn(&[u8]) -> bool) {
    let variable = |name| env::var(name).ok().map(|text| text.parse::<f64>().unwrap());
    let seed = variable("BITNET_FUZZ_SEED").unwrap_or(1.) as u64;
    let budget = variable("BITNET_FUZZ_SECONDS").map(Duration::from_secs_f64);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for seed in seeds {
        assert!(read(seed), "{target}: a valid input is refused");
    }
    silence();
    let (begin, mut inputs, mut refused) = (Instant::now(), 0, 0);
    while budget.map_or(inputs < INPUTS, |budget| begin.elapsed() < budget) {
        let input = mutated(seeds, &mut rng);
        let started = Instant::now();
        SILENT.set(true);
        let taken = catch_unwind(AssertUnwindSafe(|| read(&input)));
        SILENT.set(false);
        let fault = match taken {
            Ok(taken) if started.elapsed() < SLOW => {
                (inputs, refused) = (inputs + 1, refused + usize::from(!taken));
                continue;
            }
            Ok(_) => format!("took {:?}", started.elapsed()),
            Err(panic) => message(&*panic).to_owned(),
        };
        panic!("{}: {fault}", keep(target, &input));
    }
    println!("{target}: {inputs} inputs of seed {seed}, {refused} refused");
    assert!(refused > 0, "{target}: {inputs} damaged inputs, and none is refused");
}

/// Writes an input where it can be looked at; the words that say so.
fn keep(target: &str, input: &[u8]) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}.mutated"));
    fs::write(&path, input).unwrap();
    format!("{}", path.display())
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panicked")
}

/// A seed with some changes.
fn mutated(seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut input = seeds.choose(rng).unwrap().clone();
    for _ in 0..*[1, 1, 2, 3, 8].choose(rng).unwrap() {
        change(&mut input, seeds, rng);
    }
    input
}

fn change(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut ChaCha8Rng) {
    if input.is_empty() {
        return input.push(rng.random());
    }
    // What tells sizes and places stands in front: half of the changes are there.
    let front = if rng.random_bool(0.5) { input.len().min(4096) } else { input.len() };
    let at = rng.random_range(0..front);
    let rest = input.len() - at;
    let len = rng.random_range(1..=rest.min(64));
    match rng.random_range(0..9) {
        0 | 1 => input[at] ^= 1 << rng.random_range(0..8),
        2 => {
            input[at] = *[0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b'-', b'9'].choose(rng).unwrap()
        }
        3 => drop(input.drain(at..at + len)),
        4 => input.truncate(at),
        5 => {
            let copy = input[at..at + len].to_vec();
            drop(input.splice(at..at, copy));
        }
        6 => {
            let number = *[0, 1, u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 31, 1 << 40]
                .choose(rng)
                .unwrap();
            let width = *[1, 2, 4, 8].choose(rng).unwrap();
            let width = rest.min(width);
            input[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        7 => digits(input, at, rng),
        _ => {
            let other = seeds.choose(rng).unwrap();
            let from = rng.random_range(0..other.len());
            let part = &other[from..other.len().min(from + len)];
            drop(input.splice(at..at + len, part.iter().copied()));
        }
    }
}

/// Another number in place of the first one in the text from `at`.
fn digits(input: &mut Vec<u8>, at: usize, rng: &mut ChaCha8Rng) {
    let Some(start) = input[at..].iter().position(u8::is_ascii_digit).map(|i| at + i) else {
        return;
    };
    let len = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let numbers = [
        "0",
        "1",
        "-1",
        "2147483648",
        "18446744073709551615",
        "1e308",
        "0.5",
        "99999999999999999999",
    ];
    let number = numbers.choose(rng).unwrap().bytes();
    drop(input.splice(start..start + len, number));
}
