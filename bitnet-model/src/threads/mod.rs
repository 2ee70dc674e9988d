//! The threads that compute one operation together, and spin between operations.
//!
//! A token takes some 150 short parallel regions. Waking a sleeping thread costs tens of microseconds, as much as
//! such a region; so the helpers of this pool look out for the next region for some 100 µs before they sleep.
//! Work is handed out task by task, so a thread that the system holds up delays nobody but for its own task. Results
//! never depend on which thread runs a task.
//!
//! One region runs at a time: a caller that finds the pool busy runs its tasks itself.

#![allow(unsafe_code)] // a region borrows from its caller's stack; every block states why that is sound

use std::{
    env, fs, hint,
    num::NonZeroUsize,
    panic::{self, AssertUnwindSafe},
    sync::{
        Condvar, Mutex, OnceLock, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::*},
    },
    thread,
};

mod parts;

pub use parts::{
    Block, Unwritten, for_each_block, for_each_chunk, for_each_chunk_pair, map, new_blocks,
    new_chunks, written_blocks,
};

/// Turns of waiting before a helper sleeps: some 100 µs, longer than the serial code between two regions of a token.
const SPINS: u32 = 4000;

/// In [`Pool::gate`]: the region takes more helpers. The other bits count those inside.
const OPEN: u32 = 1 << 31;

/// A region as its helpers see it: the caller's closure, its type erased.
#[derive(Clone, Copy)]
struct Region {
    run: unsafe fn(*const (), usize),
    closure: *const (),
    tasks: usize,
}

struct Pool {
    /// Held by the caller of the region that runs.
    caller: Mutex<()>,
    /// Written by the caller while the gate is shut and nobody is inside, read by helpers inside.
    region: std::cell::UnsafeCell<Region>,
    gate: AtomicU32,
    next_task: AtomicUsize,
    panicked: AtomicBool,
    /// Counts regions: tells helpers that there is a new one.
    epoch: AtomicU32,
    sleepers: AtomicU32,
    bed: Mutex<()>,
    alarm: Condvar,
    muster: Condvar,
    /// Helpers that exist, and helpers that take part.
    helpers: AtomicUsize,
    enlisted: AtomicUsize,
}

// SAFETY: `region` is the one field that is not Sync by itself. Its closure is Sync (`for_each` demands it) and the
// protocol of `gate` separates the write from the reads: see `Pool::for_each` and `Pool::help`.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool {
    caller: Mutex::new(()),
    region: std::cell::UnsafeCell::new(Region {
        run: |_, _| (),
        closure: std::ptr::null(),
        tasks: 0,
    }),
    gate: AtomicU32::new(0),
    next_task: AtomicUsize::new(0),
    panicked: AtomicBool::new(false),
    epoch: AtomicU32::new(0),
    sleepers: AtomicU32::new(0),
    bed: Mutex::new(()),
    alarm: Condvar::new(),
    muster: Condvar::new(),
    helpers: AtomicUsize::new(0),
    enlisted: AtomicUsize::new(0),
};

/// Sets the number of threads, the caller included, that operations run on from now on.
pub fn set_count(threads: NonZeroUsize) {
    STARTED.get_or_init(|| ());
    POOL.enlist(threads.get() - 1);
}

/// Makes Candle's own threads sleep between its operations, instead of spinning for a while on the cores that these threads
/// need. To be called once, first thing in `main`: it sets a variable of the environment, so it does nothing where other
/// threads may be reading that, or where `CANDLE_BARRIER_POOL_SPIN_LIMIT` is set already.
pub fn keep_candle_from_spinning() {
    const SPINS: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";
    let alone = fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if alone && env::var_os(SPINS).is_none() {
        // SAFETY: this is the only thread, as the system has just counted, so nobody else reads the environment.
        unsafe { env::set_var(SPINS, "1") };
    }
}

/// The number of threads that operations run on: what [`set_count`] said, else as many as rayon has.
pub fn count() -> usize {
    start();
    POOL.enlisted.load(Relaxed) + 1
}

static STARTED: OnceLock<()> = OnceLock::new();

fn start() {
    STARTED.get_or_init(|| {
        POOL.enlist(rayon::current_num_threads() - 1); // RAYON_NUM_THREADS holds for both
    });
}

/// Calls `task` with every number below `tasks`, on all threads; returns when all are done.
///
/// # Panics
/// If a task panics.
pub fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    start();
    POOL.for_each(tasks, &task);
}

impl Pool {
    /// Makes `count` helpers take part; those that do not exist yet are started.
    fn enlist(&'static self, count: usize) {
        let _region = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        for index in self.helpers.load(Relaxed)..count {
            let name = format!("bitnet-{}", index + 1);
            let started = thread::Builder::new().name(name).spawn(move || self.help(index));
            if let Err(error) = started {
                tracing::warn!("computing on {} threads: cannot start another: {error}", index + 1);
                break;
            }
            self.helpers.store(index + 1, Relaxed);
        }
        let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.enlisted.store(count.min(self.helpers.load(Relaxed)), Relaxed);
        self.muster.notify_all();
    }

    fn for_each<F: Fn(usize) + Sync>(&self, tasks: usize, task: &F) {
        unsafe fn run<F: Fn(usize)>(closure: *const (), index: usize) {
            // SAFETY: `closure` is the `task` of the caller, who waits in `for_each` until nobody uses it.
            unsafe { (*closure.cast::<F>())(index) }
        }
        let region = match self.caller.try_lock() {
            Ok(region) if tasks > 1 && self.enlisted.load(Relaxed) > 0 => region,
            Err(TryLockError::Poisoned(poisoned)) if tasks > 1 => poisoned.into_inner(),
            _ => return (0..tasks).for_each(task),
        };
        self.next_task.store(0, Relaxed);
        // SAFETY: we hold `caller` and the last caller left with the gate shut and nobody inside, so nobody reads this.
        unsafe {
            *self.region.get() =
                Region { run: run::<F>, closure: std::ptr::from_ref(task).cast(), tasks };
        }
        self.gate.store(OPEN, Release);
        let closing = Closing(self);
        self.epoch.fetch_add(1, SeqCst); // before `sleepers` is read: whoever goes to bed now sees the new epoch
        if self.sleepers.load(SeqCst) > 0 {
            let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.alarm.notify_all();
        }
        loop {
            let index = self.next_task.fetch_add(1, Relaxed);
            if index >= tasks {
                break;
            }
            task(index);
        }
        drop(closing);
        let panicked = self.panicked.swap(false, Relaxed);
        drop(region);
        assert!(!panicked, "a task of a parallel operation panicked");
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen);
            if index >= self.enlisted.load(Relaxed) {
                let bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
                let discharged = |(): &mut ()| index >= self.enlisted.load(Relaxed);
                drop(self.muster.wait_while(bed, discharged));
                continue;
            }
            let entered = self
                .gate
                .fetch_update(Acquire, Relaxed, |gate| (gate & OPEN != 0).then_some(gate + 1));
            if entered.is_err() {
                continue; // the region ended without us
            }
            // SAFETY: we are inside: the caller wrote `region` before it opened the gate, and waits for us to leave.
            let region = unsafe { *self.region.get() };
            let work = || {
                loop {
                    let index = self.next_task.fetch_add(1, Relaxed);
                    if index >= region.tasks {
                        break;
                    }
                    // SAFETY: as above; `run` belongs to `closure`.
                    unsafe { (region.run)(region.closure, index) };
                }
            };
            if panic::catch_unwind(AssertUnwindSafe(work)).is_err() {
                self.panicked.store(true, Relaxed);
            }
            self.gate.fetch_sub(1, Release);
        }
    }

    /// Waits for an epoch other than `seen`: awake for a while, then asleep.
    fn wait(&self, seen: u32) -> u32 {
        for _ in 0..SPINS {
            let epoch = self.epoch.load(Acquire);
            if epoch != seen {
                return epoch;
            }
            hint::spin_loop();
        }
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, SeqCst);
        let epoch = loop {
            let epoch = self.epoch.load(SeqCst);
            if epoch != seen {
                break epoch;
            }
            bed = self.alarm.wait(bed).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, SeqCst);
        epoch
    }
}

/// Shuts the gate and waits until the last helper has left, even if the caller's own task panics.
struct Closing<'a>(&'a Pool);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // Nobody takes another task: what is left after a panic stays undone.
        self.0.next_task.store(usize::MAX / 2, Relaxed);
        self.0.gate.fetch_and(!OPEN, AcqRel);
        let mut turns = 0u32;
        while self.0.gate.load(Acquire) != 0 {
            turns += 1;
            match turns > SPINS {
                true => thread::yield_now(), // a helper was held up: let it have this core
                false => hint::spin_loop(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for tasks in [0, 1, 2, 7, 1000] {
            let mut counts = vec![0u32; tasks];
            for _ in 0..50 {
                for_each_chunk(&mut counts, 1, |_, count| count[0] += 1);
            }
            assert!(counts.iter().all(|&count| count == 50));
        }
        let mut ragged = vec![0; 10];
        for_each_chunk(&mut ragged, 4, |i, chunk| chunk.fill(i * 10 + chunk.len()));
        assert_eq!(ragged, [4, 4, 4, 4, 14, 14, 14, 14, 22, 22]);
        let mut matrix = [[0; 5]; 3];
        for_each_block(matrix.as_flattened_mut(), 2, &[0, 3, 5], |(row, j), mut block| {
            (0..block.rows()).for_each(|i| block.row(i).fill(10 * row + j));
        });
        let expected = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [20, 20, 20, 21, 21]];
        assert_eq!(matrix, expected);
        let written = written_blocks(3, 2, &[0, 3, 5], |(row, j), block| {
            for i in 0..block.rows() {
                (0..3 - j).for_each(|_| block.extend(i, &[10 * row + j], |x| *x));
            }
        });
        assert_eq!(written, expected.as_flattened());
        assert_eq!(map(vec![3; 100], |i| i + 1), [4; 100]);
        assert_eq!(map((0..100).collect(), |i| i).len(), 100);
        let chunks = new_chunks(10, 4, |i, chunk: &mut [usize]| {
            assert!(chunk.iter().all(|x| *x == 0));
            chunk.fill(i * 10 + chunk.len());
        });
        assert_eq!(chunks, ragged);
    }

    #[test]
    fn a_block_is_written_as_a_whole() {
        for (len, other) in [(2, 3), (4, 3), (3, 0)] {
            let run = || {
                written_blocks(2, 1, &[0, 3], |(row, _), block| {
                    let len = if row == 1 { len } else { 3 };
                    block.extend(0, &vec![0u8; len], |x| *x);
                    let other = if row == 1 { other } else { 0 };
                    block.extend(0, &vec![0u8; other], |x| *x);
                })
            };
            assert_eq!(panic::catch_unwind(run).is_ok(), len + other == 3, "{len} {other}");
        }
    }

    #[test]
    fn regions_within_and_beside_regions_run() {
        let sum = AtomicU64::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        for_each(5, |i| {
                            for_each(3, |j| _ = sum.fetch_add((i * j) as u64, Relaxed))
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 4 * 100 * 10 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for bad in 0..20 {
            let run = || for_each(20, |i| assert!(i != bad, "task {i}"));
            assert!(panic::catch_unwind(run).is_err());
            let count = AtomicU64::new(0);
            for_each(20, |_| _ = count.fetch_add(1, Relaxed));
            assert_eq!(count.into_inner(), 20);
        }
    }
}
