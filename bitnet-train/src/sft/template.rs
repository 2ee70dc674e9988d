//! `data.chat_template`: which template conversations are written with.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A template other than the tokenizer's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum Template {
    /// `none`: plain prompts, even if the tokenizer has a template.
    None,
    /// A Jinja file.
    File(PathBuf),
}

/// The word for no template.
const NONE: &str = "none";

impl From<PathBuf> for Template {
    fn from(path: PathBuf) -> Self {
        if path.as_os_str() == NONE { Self::None } else { Self::File(path) }
    }
}

impl From<Template> for PathBuf {
    fn from(template: Template) -> Self {
        match template {
            Template::None => NONE.into(),
            Template::File(path) => path,
        }
    }
}
