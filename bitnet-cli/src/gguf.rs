//! A model written as one GGUF file: whole under its name, or not at all.

use std::{fs, path::Path};

use anyhow::{Context, bail};
use bitnet_model::{
    checkpoint::{
        export,
        gguf::{Contents, Gguf, TernaryType, write},
    },
    pretrained::Source,
};

use crate::{args::Global, folder, progress};

/// Refuses an `output` that is there, unless it is a GGUF file and `force` is given.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    let path = output.display();
    if !Gguf::is_named_so(output) {
        bail!("{path}: is to be a GGUF file: give it a name that ends in .gguf");
    }
    match output.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(metadata) if !metadata.is_file() => bail!("{path}: is there and no file"),
        Ok(_) if force => Ok(()),
        Ok(_) => bail!("{path}: is there: choose another name, or pass --force to replace it"),
    }
}

/// Writes `source` to the file `output`, reads it back and compares. Returns how many tensors and bytes it has.
pub fn convert(
    source: &Source,
    ternary: TernaryType,
    output: &Path,
    global: &Global,
) -> anyhow::Result<(usize, u64)> {
    let (parent, name) = folder::place(output)?;
    let folder = folder::temporary(&parent, &name)?;
    let path = folder.path().join(&name);
    let bar = progress::bar(global, 0, "{msg:8} {bar:30} {pos}/{len} {eta}");
    let step = |position: usize, len: usize| {
        bar.set_length(len as u64);
        bar.set_position(position as u64);
    };
    bar.set_message("writing");
    let text = source.text_files()?;
    let name = source.name.rsplit('/').next().unwrap_or(&source.name);
    let contents = Contents {
        name,
        config: &source.config,
        checkpoint: &source.checkpoint,
        text: text.as_ref(),
    };
    write(contents, ternary, &path, step)?;
    bar.set_message("checking");
    let written = Gguf::open(&path)?;
    let checkpoint = written.checkpoint()?;
    let from = (&source.config, &*source.checkpoint);
    export::verify(from, (written.config(), &checkpoint), step)?;
    bar.finish_and_clear();
    let bytes = fs::metadata(&path).with_context(|| path.display().to_string())?.len();
    fs::rename(&path, output).with_context(|| output.display().to_string())?;
    Ok((written.tensors(), bytes))
}
