//! The products with ternary weights on CUDA device 0, in Markdown: `cargo bench -p bitnet-model --features cuda --bench cuda`.
//!
//! What is timed is the op as a model calls it: quantizing a token, then multiplying it. Launches are queued faster than
//! they run or slower, depending on the sizes, so two times are told: that of the device, for which the launches are queued
//! behind work that takes longer than queuing them; and that of the program, which queues them and waits for the last.
//!
//! With `--try` the matrices are small and few: whether it runs, on whatever stands in for a device.

#![allow(missing_docs, clippy::unwrap_used)] // a benchmark may stop

use std::{
    env,
    sync::Arc,
    time::{Duration, Instant},
};

use bitnet_model::{
    kernels::TileFormat, ops::ternary_matmul, quant::Rounding, weights::TernaryWeight,
};
use candle_core::{
    Device, Tensor,
    cuda_backend::cudarc::driver::{CudaContext, sys::CUdevice_attribute},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Weights = Arc<[TernaryWeight]>;

/// The projections of a layer of 2B-4T: out_features, stacked, and in_features.
const PROJECTIONS: [(&str, &[usize], usize); 4] = [
    ("q, k, v", &[2560, 640, 640], 2560),
    ("o", &[2560], 2560),
    ("gate, up", &[6912, 6912], 2560),
    ("down", &[2560], 6912),
];

/// Its layers.
const LAYERS: usize = 30;

/// (out_features, in_features), and the microseconds of the W2A8 kernel in the repository microsoft/BitNet on an A100.
const PUBLISHED: [((usize, usize), f64); 4] =
    [((2560, 2560), 13.3), ((13824, 2560), 18.75), ((2560, 6912), 14.5), ((20480, 3200), 31.0)];

/// Tokens of the product that keeps the device busy while launches are queued.
const BUSY_TOKENS: usize = 2048;

/// How much is done.
#[derive(Clone, Copy)]
struct Effort {
    /// Measurements that a median is of.
    samples: usize,
    /// Products of one matrix in a measurement: their launches are fewer than the 1024 that a queue holds.
    repeated: usize,
    /// Bytes of the copies of a projection that are multiplied in turn: more than a second-level cache holds.
    copies: usize,
    /// What sizes are divided by.
    smaller: usize,
}

const FULL: Effort = Effort { samples: 21, repeated: 100, copies: 256 << 20, smaller: 1 };
const TRY: Effort = Effort { samples: 2, repeated: 2, copies: 1, smaller: 40 };

fn main() {
    let trying = env::args().any(|arg| arg == "--try");
    let bench = Bench::new(if trying { TRY } else { FULL });
    bench.device();
    bench.published();
    bench.layers();
}

struct Bench {
    device: Device,
    context: Arc<CudaContext>,
    effort: Effort,
    busy: (Weights, Tensor),
}

/// Microseconds of one op.
struct Times {
    device: Vec<f64>,
    program: Vec<f64>,
}

impl Effort {
    fn size(self, size: usize) -> usize {
        (size / self.smaller).next_multiple_of(16)
    }
}

/// Any matrices, stacked.
fn weights(rows: &[usize], cols: usize) -> Weights {
    let mut rng = ChaCha8Rng::seed_from_u64(158);
    let mut codes = || (0..4).fold(0, |byte, field| byte | rng.random_range(0..3u8) << (2 * field));
    let weight = |&rows: &usize| {
        let bytes: Vec<u8> = (0..rows / 4 * cols).map(|_| codes()).collect();
        TernaryWeight::from_packed(&bytes, (rows, cols), 1., TileFormat::TwoBit).unwrap()
    };
    rows.iter().map(weight).collect()
}

fn input(tokens: usize, cols: usize, device: &Device) -> Tensor {
    Tensor::rand(-1f32, 1., (tokens, cols), &Device::Cpu).unwrap().to_device(device).unwrap()
}

impl Bench {
    fn new(effort: Effort) -> Self {
        let device = Device::new_cuda(0).unwrap();
        let context = device.as_cuda_device().unwrap().cuda_stream().context().clone();
        let size = effort.size(2560);
        let busy = (weights(&[size], size), input(BUSY_TOKENS / effort.smaller, size, &device));
        Self { device, context, effort, busy }
    }

    fn multiply(&self, weights: &Weights, x: &Tensor) {
        ternary_matmul(x, weights, Rounding::HalfEven).unwrap();
    }

    fn wait(&self) {
        self.device.synchronize().unwrap();
    }

    /// The time until all that `queue` queues is done.
    fn time(&self, queue: impl Fn()) -> Duration {
        self.wait();
        let start = Instant::now();
        queue();
        self.wait();
        start.elapsed()
    }

    /// The times of each op that `queue` queues `ops` of.
    fn times(&self, ops: usize, queue: impl Fn()) -> Times {
        queue(); // the first time copies the weights and loads the kernels
        let alone = self.time(&queue);
        let busy = |products: usize| {
            (0..products).for_each(|_| self.multiply(&self.busy.0, &self.busy.1));
        };
        busy(1);
        // Twice as long as queuing takes at most, on a device that is done at once.
        let products = (2. * alone.as_secs_f64() / self.time(|| busy(1)).as_secs_f64()).ceil();
        let products = (products as usize).clamp(1, 200);
        let of_one = |time: f64| 1e6 * time / ops as f64;
        let mut times = Times { device: Vec::new(), program: Vec::new() };
        for _ in 0..self.effort.samples {
            times.program.push(of_one(self.time(&queue).as_secs_f64()));
            let without = self.time(|| busy(products)).as_secs_f64();
            let with = self.time(|| {
                busy(products);
                queue();
            });
            times.device.push(of_one(with.as_secs_f64() - without));
        }
        times
    }

    /// Bytes a second that the memory can deliver: two transfers a clock.
    fn bandwidth(&self) -> Option<f64> {
        let attribute =
            |attribute| self.context.attribute(attribute).ok().filter(|&value| value > 0);
        let kilohertz = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bits = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        Some(2e3 * f64::from(kilohertz) * f64::from(bits) / 8.)
    }

    /// What is measured.
    fn device(&self) {
        let (major, minor) = self.context.compute_capability().unwrap();
        println!("- device: {}, compute capability {major}.{minor}", self.context.name().unwrap());
        println!(
            "- memory: {:.1} GiB",
            self.context.total_mem().unwrap() as f64 / (1u64 << 30) as f64
        );
        match self.bandwidth() {
            Some(bandwidth) => {
                println!("- bandwidth by clock and width: {:.0} GB/s", bandwidth * 1e-9)
            }
            None => println!("- bandwidth: not told by the driver"),
        }
        println!(
            "- figures: median of {} and, after ±, half of what lies between the quartiles",
            self.effort.samples
        );
    }

    /// Beside the published times of another kernel. The same matrix is read again and again, so from the second-level cache
    /// where that holds it.
    fn published(&self) {
        println!("\n### One token, one matrix again and again\n");
        println!(
            "| out × in | device, µs | program, µs | GB/s of codes | Microsoft on an A100, µs | ratio |"
        );
        println!("|---|---:|---:|---:|---:|---:|");
        for ((rows, cols), published) in PUBLISHED {
            let (rows, cols) = (self.effort.size(rows), self.effort.size(cols));
            let (weights, x) = (weights(&[rows], cols), input(1, cols, &self.device));
            let queue = || (0..self.effort.repeated).for_each(|_| self.multiply(&weights, &x));
            let times = self.times(self.effort.repeated, queue);
            let device = median(&times.device);
            let rate = bytes(rows, cols) / device * 1e-3;
            let (device, program) = (shown(&times.device), shown(&times.program));
            let ratio = median(&times.device) / published;
            println!(
                "| {rows} × {cols} | {device} | {program} | {rate:.0} | {published} | {ratio:.2} |"
            );
        }
    }

    /// All projections of a token. Copies are multiplied in turn, as a model reads its layers, so that each comes from memory.
    fn layers(&self) {
        println!("\n### One token, the projections of 2B-4T\n");
        println!("| projection | device, µs | program, µs | GB/s of codes | floor, µs | reached |");
        println!("|---|---:|---:|---:|---:|---:|");
        let mut token = [0.; 3];
        for (name, rows, cols) in PROJECTIONS {
            let rows: Vec<usize> = rows.iter().map(|&rows| self.effort.size(rows)).collect();
            let (all, cols) = (rows.iter().sum(), self.effort.size(cols));
            let copies = (self.effort.copies / bytes(all, cols) as usize).max(1);
            let copies: Vec<Weights> = (0..copies).map(|_| weights(&rows, cols)).collect();
            let x = input(1, cols, &self.device);
            let queue = || copies.iter().for_each(|weights| self.multiply(weights, &x));
            let times = self.times(copies.len(), queue);
            let device = median(&times.device);
            let floor =
                self.bandwidth().map_or(f64::NAN, |bandwidth| 1e6 * bytes(all, cols) / bandwidth);
            for (sum, time) in token.iter_mut().zip([device, median(&times.program), floor]) {
                *sum += LAYERS as f64 * time;
            }
            let rate = bytes(all, cols) / device * 1e-3;
            let (shown, program) = (shown(&times.device), shown(&times.program));
            println!("| {name} | {shown} | {program} | {rate:.0} | {} |", reached(floor, device));
        }
        let [device, program, floor] = token;
        let reached = reached(floor, device);
        println!("| all of {LAYERS} layers | {device:.0} | {program:.0} | | {reached} |");
    }
}

/// Bytes of codes.
fn bytes(rows: usize, cols: usize) -> f64 {
    (rows * cols) as f64 / 4.
}

/// The floor, if it is known, and which part of what it allows is reached.
fn reached(floor: f64, time: f64) -> String {
    match floor.is_finite() {
        true => format!("{floor:.1} | {:.0} %", 100. * floor / time),
        false => "– | –".into(),
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(samples: &[f64]) -> f64 {
    sorted(samples)[samples.len() / 2]
}

/// The median and half of what lies between the quartiles.
fn shown(samples: &[f64]) -> String {
    let (sorted, quarter) = (sorted(samples), samples.len() / 4);
    let spread = (sorted[samples.len() - 1 - quarter] - sorted[quarter]) / 2.;
    format!("{:.2} ± {spread:.2}", median(samples))
}
