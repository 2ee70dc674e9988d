//! A safetensors file: opened and every tensor read. Whatever is wrong must be an error.

#![no_main]

use std::io::Write;

use bitnet_model::{Result, checkpoint::Checkpoint};
use libfuzzer_sys::fuzz_target;

fn read(bytes: &[u8]) -> Result<()> {
    let mut file = tempfile::NamedTempFile::new().expect("a file for a moment");
    file.write_all(bytes).expect("room for it");
    let checkpoint = Checkpoint::open(&[file.path().into()])?;
    for name in checkpoint.names() {
        checkpoint.read(name)?;
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    let _ = read(bytes);
});
