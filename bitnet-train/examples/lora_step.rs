//! Time and memory of a LoRA step on the geometry of microsoft/bitnet-b1.58-2B-4T, with weights made in memory:
//!
//! ```text
//! cargo run --release -p bitnet-train --example lora_step -- [TOKENS [RANK [STEPS [f32|bf16 [MIB]]]]]
//! ```
//!
//! One sequence of TOKENS tokens (256), rank RANK (16) on all seven projections, every block computed again in the backward
//! pass but for products kept in MIB MiB (448), every label counting; clipped, and updated by AdamW.

use std::time::Instant;

use bitnet_model::{
    adapter::AdapterConfig,
    hub::Hub,
    ops::gemm::Precision,
    pages,
    pretrained::{Precision as Form, Source},
    threads,
};
use bitnet_train::{
    batch::Batch,
    language_model::LanguageModel,
    lora::{LoraModel, LoraTask, Mode, Training},
    loss::shift_labels,
    metrics,
    objective::NextToken,
    optimizer::{AdamW, AdamWConfig, Decay, Rates, Update, clip_factor, global_norm},
    task::{Gradients, Task},
};
use candle_core::Device;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    pages::keep_freed_memory();
    threads::keep_candle_from_spinning();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize, default: usize| match args.get(index) {
        Some(arg) => arg.parse().map_err(|e| format!("{arg}: {e}")),
        None => Ok(default),
    };
    let (tokens, rank, steps) = (number(0, 256)?, number(1, 16)?, number(2, 3)?);
    let precision = match args.get(3).map(String::as_str) {
        Some("f32") => Precision::F32,
        _ => Precision::Bf16,
    };
    let source = Source::open("synthetic:2b-4t", Form::AsConfigured, &Hub::from_env())?;
    let config = AdapterConfig { rank, alpha: 2. * rank as f64, dropout: 0., ..Default::default() };
    let keep_bytes = number(4, 448)? << 20;
    let training = Training { mode: Mode::Adapter, seed: 0, backward: precision, keep_bytes };
    let LoraModel { trained, frozen, parameters, step } =
        LoraModel::load(&source, &config, training, &Device::Cpu)?;
    report("loaded");
    let named = parameters.named();
    let task = LanguageModel::new(trained, frozen, Box::new(NextToken { precision }))
        .backward(precision)
        .recompute(true);
    let task = LoraTask::new(task, step, 0);
    let config = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: Decay::Matrices };
    let mut adamw = AdamW::new(&named, config)?;
    let inputs: Vec<u32> = (0..tokens as u32).map(|i| i * 7919 % 128_000).collect();
    let labels = shift_labels(&inputs, tokens);
    let batch = Batch { inputs, labels, starts: Vec::new(), sequence_length: tokens };
    for index in 0..steps {
        let started = Instant::now();
        task.begin(index)?;
        let mut gradients = Gradients::new(&named);
        let parts = task.pass(&batch, batch.items(), &mut gradients)?;
        let gradients = gradients.finish()?;
        let grad_factor = clip_factor(global_norm(&gradients)?, 1.);
        let rates = Rates { lr: 1e-4, weight_decay: 0. };
        adamw.step(&gradients, Update { rates, grad_factor })?;
        let seconds = started.elapsed().as_secs_f64();
        let speed = tokens as f64 / seconds;
        report(&format!("loss {:.4}, {seconds:.2} s, {speed:.1} tokens/s", parts[0].value));
    }
    Ok(())
}

fn report(what: &str) {
    let peak = metrics::memory().map_or(f64::NAN, |m| m.peak_bytes as f64 / (1u64 << 30) as f64);
    println!("{what}; peak {peak:.2} GiB");
}
