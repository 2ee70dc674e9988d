//! Continues a prompt: `cargo run --release -p bitnet-model --example generate -- "Once upon a time"`
//! A second argument names another model: a Hub repo id, a folder or a `.safetensors` file.

use std::{
    env,
    io::{self, Write},
    ops::ControlFlow,
};

use bitnet_model::{
    pretrained::{DEFAULT, Pretrained},
    sampler::{Sampler, SamplingParams},
    session::{GenerateOptions, Session},
};
use rand::SeedableRng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = env::args().nth(1).unwrap_or("Once upon a time".into());
    let model = Pretrained::open(&env::args().nth(2).unwrap_or(DEFAULT.into()))?;
    let tokenizer = model.tokenizer.ok_or("the model has no tokenizer")?;
    let options = GenerateOptions {
        sampler: Sampler::new(SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            ..Default::default()
        })?,
        max_new_tokens: 200,
        eos_token_ids: model.generation.eos_token_ids,
        interrupt: Default::default(),
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut text = tokenizer.stream(true);
    print!("{prompt}");
    Session::new(model.model).generate(
        &tokenizer.encode(&prompt, true)?,
        &options,
        &mut rng,
        |id| {
            if let Ok(Some(piece)) = text.push(id) {
                print!("{piece}");
                let _ = io::stdout().flush();
            }
            ControlFlow::Continue(())
        },
    )?;
    println!("{}", text.finish()?.unwrap_or_default());
    Ok(())
}
