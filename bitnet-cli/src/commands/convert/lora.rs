//! An adapter in PEFT's format written as one GGUF file.

use anyhow::{Context, bail};
use bitnet_model::{
    adapter::{Adapter, WEIGHTS},
    checkpoint::write_atomic,
    hub::Hub,
    pretrained::{Precision, Source},
};

use super::{
    Args, Written,
    place::{Place, card_path},
};
use crate::{card, engines};

/// Writes the file of `args`. Returns how many bytes were read, too.
pub fn convert(args: &Args, hub: &Hub) -> anyhow::Result<(u64, Written)> {
    let folder = hub.resolve_adapter(&args.input)?;
    let adapter = Adapter::open(&folder)?;
    let Some(base) = args.base.as_ref().or(adapter.config.base_model.as_ref()) else {
        bail!("{}: does not say which model it is for: name it with --base", args.input);
    };
    // The adapter's revision is not the base's.
    let base = Source::open(base, Precision::AsFound, &Hub::from_env())
        .with_context(|| format!("the model that {} is for (--base)", args.input))?;
    let (output, card_output) = (&*args.output, card_path(&args.output));
    let place = Place::new(output)?;
    let name = args.input.trim_end_matches('/').rsplit('/').next().unwrap_or(&args.input);
    adapter.write_gguf(&base.config, name, &place.of(output))?;
    let bytes = place.bytes(output)?;
    let card = card::of_adapter(&adapter, name, &base, output)?;
    write_atomic(&place.of(&card_output), card.as_bytes())?;
    place.publish(&[output, &card_output])?;
    if let Err(reason) = engines::llama_cpp(&base.config, "tq2_0") {
        tracing::warn!("{}: llama.cpp does not run its model: {reason}", output.display());
    }
    let path = folder.join(WEIGHTS);
    let read = std::fs::metadata(&path).with_context(|| path.display().to_string())?.len();
    Ok((read, Written { tensors: 2 * adapter.pairs.len(), bytes }))
}
