//! Continues a prompt: `cargo run --release -p bitnet-model --example generate -- "Once upon a time"`
//! A second argument names another model: a Hub repo id, a folder or a `.safetensors` file.

use std::{env, ops::ControlFlow};

use bitnet_model::{
    pretrained::{DEFAULT, Pretrained},
    sampler::{Sampler, SamplingParams},
    session::{GenerateOptions, Session},
};
use rand::SeedableRng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args().skip(1);
    let prompt = args.next().unwrap_or("Once upon a time".into());
    let bitnet = Pretrained::open(&args.next().unwrap_or(DEFAULT.into()))?;
    let tokenizer = bitnet.tokenizer.ok_or("the model has no tokenizer")?;
    let params = SamplingParams { temperature: 0.6, top_p: 0.9, ..Default::default() };
    let options = GenerateOptions {
        sampler: Sampler::new(params)?,
        max_new_tokens: 200,
        eos_token_ids: bitnet.generation.eos_token_ids,
        interrupt: Default::default(),
    };
    let ids = tokenizer.encode(&prompt, true)?;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    let mut text = tokenizer.stream(true);
    print!("{prompt}");
    Session::new(bitnet.model).generate(&ids, &options, &mut rng, |id| match text.push(id) {
        Ok(piece) => {
            print!("{}", piece.unwrap_or_default());
            ControlFlow::Continue(())
        }
        Err(_) => ControlFlow::Break(()),
    })?;
    println!("{}", text.finish()?.unwrap_or_default());
    Ok(())
}
