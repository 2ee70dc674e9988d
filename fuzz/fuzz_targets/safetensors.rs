//! A safetensors file: opened and every tensor read. Whatever is wrong must be an error.

#![no_main]

use bitnet_model::{Result, checkpoint::Checkpoint};
use libfuzzer_sys::fuzz_target;

fn read(bytes: &[u8]) -> Result<()> {
    let checkpoint = Checkpoint::from_bytes("fuzz.safetensors", bytes.to_vec())?;
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let _ = read(bytes);
});
