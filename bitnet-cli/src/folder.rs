//! The folder of a model that a command writes: whole under its name, or not at all.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use bitnet_model::pretrained::{Origin, Source, default_files};

/// The folder that will hold `output`, and the last part of its path.
pub fn place(output: &Path) -> anyhow::Result<(PathBuf, String)> {
    let Some(name) = output.file_name() else {
        bail!("{}: names no folder of its own: give a new one", output.display());
    };
    let parent = match output.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        bail!("{}: no such folder: make it first", parent.display());
    }
    Ok((parent.to_owned(), name.to_string_lossy().into_owned()))
}

/// Refuses an `output` that is there, unless it is an empty folder, or a model's and `force` is given.
pub fn check_free(output: &Path, force: bool) -> anyhow::Result<()> {
    let path = output.display();
    if output.symlink_metadata().is_err() {
        return Ok(());
    }
    if !output.is_dir() || output.is_symlink() {
        bail!("{path}: is there and no folder: choose another one");
    }
    let entries = fs::read_dir(output).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let entries = entries.with_context(|| path.to_string())?;
    if entries.is_empty() {
        return Ok(());
    }
    if !force {
        bail!("{path}: is not empty: choose another folder, or pass --force to replace a model's");
    }
    // What is replaced is deleted: only what looks like a model and nothing more.
    let is_model = output.join("config.json").is_file();
    if !is_model || entries.iter().any(|entry| entry.path().is_dir()) {
        bail!(
            "{path}: --force replaces a model's folder, and this has no config.json or has folders in it"
        );
    }
    Ok(())
}

/// Ctrl-C leaves nothing behind.
fn clean_up_on_interrupt(folder: PathBuf) -> anyhow::Result<()> {
    let handler = move || {
        let _ = fs::remove_dir_all(&folder);
        std::process::exit(130); // 128 + SIGINT
    };
    ctrlc::set_handler(handler).context("cannot listen for Ctrl-C")
}

/// A folder beside the final one, so that a rename brings all of it at once. It vanishes unless it is
/// [published](publish), and on Ctrl-C.
pub fn temporary(parent: &Path, name: &str) -> anyhow::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777)); // less the umask
    let folder = builder
        .tempdir_in(parent)
        .with_context(|| format!("{}: cannot be written to", parent.display()))?;
    clean_up_on_interrupt(folder.path().to_owned())?;
    Ok(folder)
}

/// Copies tokenizer and generation settings of `source` to `folder`.
pub fn copy_beside(source: &Source, folder: &Path) -> anyhow::Result<()> {
    match &source.origin {
        Origin::Embedded => {
            let weights = ["config.json", "model.safetensors"];
            for (name, data) in default_files().iter().filter(|(name, _)| !weights.contains(name)) {
                write(&folder.join(name), data)?;
            }
        }
        Origin::Synthetic => {}
        Origin::Gguf(gguf) => {
            for (name, data) in gguf.tokenizer_files()?.into_iter().flatten() {
                write(&folder.join(name), &data)?;
            }
            let json = format!("{:#}\n", source.generation.to_json());
            write(&folder.join("generation_config.json"), json.as_bytes())?;
        }
        Origin::Files(files) => {
            for path in files.companions() {
                copy(path, folder)?;
            }
        }
    }
    Ok(())
}

/// Copies the configuration of `source`, as it is, to `folder`.
pub fn copy_config(source: &Source, folder: &Path) -> anyhow::Result<()> {
    match &source.origin {
        Origin::Files(files) => copy(&files.config, folder),
        _ => {
            let json = format!("{:#}\n", source.config.to_json());
            write(&folder.join("config.json"), json.as_bytes())
        }
    }
}

fn copy(path: &Path, folder: &Path) -> anyhow::Result<()> {
    let name = path.file_name().unwrap_or_default();
    // Not `copy`, which would take over the permissions of a read-only source.
    let data = fs::read(path).with_context(|| path.display().to_string())?;
    write(&folder.join(name), &data)
}

fn write(path: &Path, data: &[u8]) -> anyhow::Result<()> {
    fs::write(path, data).with_context(|| path.display().to_string())
}

/// Brings `folder` to `output`; a model that is there goes when the new one stands.
pub fn publish(folder: tempfile::TempDir, output: &Path) -> anyhow::Result<()> {
    let failed = || format!("{}: cannot be replaced by the new model", output.display());
    let old = folder.path().with_extension("old");
    let is_replaced = output.exists();
    if is_replaced {
        fs::rename(output, &old).with_context(failed)?;
    }
    if let Err(error) = fs::rename(folder.path(), output) {
        if is_replaced {
            fs::rename(&old, output).with_context(failed)?;
        }
        return Err(error).with_context(failed);
    }
    let _ = folder.keep(); // it is no longer under that name
    if is_replaced {
        fs::remove_dir_all(&old).with_context(|| old.display().to_string())?;
    }
    Ok(())
}
