//! `bitnet download REPO`: a model from the Hub into the cache that Python's tools use as well.

use std::io::{self, Write};

use bitnet_model::hub::Hub;

use crate::args::Global;

/// Options of `bitnet download`.
#[derive(clap::Args)]
#[command(
    after_long_help = "Configuration, weights (safetensors) and tokenizer are fetched, nothing else. What the cache has is not \
fetched again, and an interrupted download goes on where it ended. Without a network a complete copy in \
the cache is used, with a warning.

The cache is the one of Python's huggingface_hub, found through HF_HUB_CACHE, HF_HOME or ~/.cache/huggingface. \
HF_TOKEN or a token left by `huggingface-cli login` opens gated models, HF_ENDPOINT names a mirror, \
HF_HUB_OFFLINE=1 forbids requests."
)]
pub struct Args {
    /// Repo id on the Hub: org/name
    #[arg(value_name = "REPO")]
    repo: String,
    /// Branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

/// Prints the snapshot folder to stdout.
pub fn run(args: Args, global: &Global) -> anyhow::Result<()> {
    let mut hub = Hub::from_env().progress(!global.quiet);
    if let Some(revision) = &args.revision {
        hub = hub.revision(revision);
    }
    let files = hub.download(&args.repo)?;
    Ok(writeln!(io::stdout(), "{}", files.root.display())?)
}
