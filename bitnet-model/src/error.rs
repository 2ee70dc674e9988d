//! The crate's one error type. Every variant names the thing that is wrong: file, field, tensor, value.

use std::{io, path::PathBuf};

/// What went wrong, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A field of `config.json` or `generation_config.json`, or a key of a GGUF file's metadata, is missing, unknown or
    /// contradictory.
    #[error("{}: `{field}`: {reason}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field, dotted for nested ones: `quantization_config.quant_method`.
        field: String,
        /// Why its value cannot be used, with the value, and what to do.
        reason: String,
    },
    /// A checkpoint file is malformed as a whole.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// One tensor of a checkpoint is absent or unusable.
    #[error("{}: tensor `{name}`: {reason}", path.display())]
    Tensor {
        /// The file, or the folder when no file holds the tensor.
        path: PathBuf,
        /// The tensor's full name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model could not be found or fetched.
    #[error("{source_name}: {reason}")]
    Hub {
        /// The repo id or path as the user gave it.
        source_name: String,
        /// What happened and what to do.
        reason: String,
    },
    /// A tokenizer file or a chat template is unusable, or text could not be encoded.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An argument of a call is out of range.
    #[error("{0}")]
    Input(String),
    /// Candle refused an operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`] about `path`; for `map_err`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
