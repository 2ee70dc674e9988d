//! A GGUF file: opened, every tensor and the vocabulary read. Whatever is wrong must be an error.

#![no_main]

use bitnet_model::{Result, checkpoint::gguf::Gguf, text::Tokenizer};
use libfuzzer_sys::fuzz_target;

fn read(bytes: Vec<u8>) -> Result<()> {
    let gguf = Gguf::from_bytes("fuzz.gguf", bytes)?;
    gguf.generation()?;
    let checkpoint = gguf.checkpoint()?;
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    if let Some([(_, tokenizer), (_, config)]) = gguf.tokenizer_files()? {
        Tokenizer::from_bytes(&tokenizer, Some(&config), None)?;
    }
    gguf.config().check_tensors(&checkpoint)
}

fuzz_target!(|bytes: &[u8]| {
    let _ = read(bytes.to_vec());
});
