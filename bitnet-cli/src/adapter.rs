//! Which adapters go beside the model: `--adapter`, which several commands share.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use anyhow::bail;
use bitnet_model::{
    adapter::{Adaptation, Adapter},
    config::Config,
    hub::Hub,
    model::Model,
    pretrained::Source,
    text::Tokenizer,
};
use clap::Args;

use crate::args::Global;

/// Options that name adapters.
#[derive(Args, Clone, Debug)]
pub struct AdapterArgs {
    /// LoRA adapter in PEFT's format to put beside the model: folder or Hub repo id, and how much of it [scale: 1]; given
    /// several times, they are summed
    #[arg(long = "adapter", value_name = "DIR[:SCALE]", value_parser = AdapterSpec::parse)]
    pub adapters: Vec<AdapterSpec>,
}

/// An adapter and how much of it.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterSpec {
    /// Folder or repository.
    pub source: String,
    /// Multiplies what it adds.
    pub scale: f64,
}

impl AdapterSpec {
    /// Reads `SOURCE` or `SOURCE:SCALE`; a path that is there is one, whatever it is called.
    pub fn parse(text: &str) -> Result<Self, String> {
        let whole = || Self { source: text.into(), scale: 1. };
        if text.is_empty() {
            return Err("there is no name of an adapter".into());
        }
        if Path::new(text).exists() {
            return Ok(whole());
        }
        let Some((source, scale)) = text.rsplit_once(':') else { return Ok(whole()) };
        match scale.parse::<f64>() {
            Ok(scale) if scale.is_finite() && !source.is_empty() => {
                Ok(Self { source: source.into(), scale })
            }
            Ok(scale) => Err(format!("{scale} is no scale of an adapter")),
            Err(_) if Path::new(source).exists() => {
                Err(format!("`{scale}` behind `{source}:` is no number to scale it by"))
            }
            Err(_) => Ok(whole()),
        }
    }
}

/// An adapter that requests choose by its name, or one without a name beside the model for all.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedAdapter {
    /// By which it is chosen.
    pub name: Option<String>,
    /// Which one.
    pub spec: AdapterSpec,
}

impl NamedAdapter {
    /// Reads `NAME=SOURCE[:SCALE]`, or without a name as [`AdapterSpec::parse`].
    pub fn parse(text: &str) -> Result<Self, String> {
        let is_name = |name: &str| !name.is_empty() && !name.contains(['/', ':', '\\']);
        let named = text.split_once('=').filter(|(name, _)| is_name(name));
        let (name, spec) = match named {
            Some((name, spec)) if !Path::new(text).exists() => (Some(name.to_owned()), spec),
            _ => (None, text),
        };
        Ok(Self { name, spec: AdapterSpec::parse(spec)? })
    }
}

impl fmt::Display for AdapterSpec {
    /// As it is given.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scale {
            1. => f.write_str(&self.source),
            scale => write!(f, "{}:{scale}", self.source),
        }
    }
}

impl AdapterArgs {
    /// The sum of the adapters; `None` if there are none. They are checked against the model, whose weights need not be loaded
    /// for it.
    pub fn read(&self, source: &Source, global: &Global) -> anyhow::Result<Option<Adaptation>> {
        read(&self.adapters, &source.config, || Ok(source.tokenizer()?), !global.quiet)
    }
}

/// What requests choose by name.
pub type NamedAdapters = BTreeMap<String, Arc<Adaptation>>;

/// What is beside the model for all, and what requests choose by name.
pub type Adapters = (Option<Adaptation>, NamedAdapters);

/// The sum of the adapters without a name, and those that have one.
pub fn read_all(
    adapters: &[NamedAdapter],
    source: &Source,
    global: &Global,
) -> anyhow::Result<Adapters> {
    let tokenizer = || Ok(source.tokenizer()?);
    let (mut for_all, mut named) = (Vec::new(), BTreeMap::new());
    for NamedAdapter { name, spec } in adapters {
        let Some(name) = name else {
            for_all.push(spec.clone());
            continue;
        };
        let adaptation = read_named(spec, &source.config, tokenizer, !global.quiet)?;
        if named.insert(name.clone(), Arc::new(adaptation)).is_some() {
            bail!("--adapter: there are two of the name `{name}`");
        }
    }
    Ok((read(&for_all, &source.config, tokenizer, !global.quiet)?, named))
}

/// An adapter that some requests choose and others don't, checked as [`read`] does.
pub fn read_named(
    spec: &AdapterSpec,
    config: &Config,
    tokenizer: impl Fn() -> anyhow::Result<Option<Tokenizer>>,
    progress: bool,
) -> anyhow::Result<Adaptation> {
    let read = read(std::slice::from_ref(spec), config, tokenizer, progress)?;
    let Some(adaptation) = read else { bail!("{spec}: there is no adapter") };
    if let Some(first) = adaptation.replaced().next() {
        bail!(
            "{spec}: replaces `{first}`, which all requests share: give it without a name, for all of them"
        );
    }
    Ok(adaptation)
}

/// The sum of adapters; `None` if there are none. They are checked against the configuration of the model and, where an adapter
/// comes with a tokenizer, against the model's.
pub fn read(
    specs: &[AdapterSpec],
    config: &Config,
    tokenizer: impl Fn() -> anyhow::Result<Option<Tokenizer>>,
    progress: bool,
) -> anyhow::Result<Option<Adaptation>> {
    if specs.is_empty() {
        return Ok(None);
    }
    let hub = Hub::from_env().progress(progress);
    let mut adapters = Vec::with_capacity(specs.len());
    for spec in specs {
        let folder = hub.resolve_adapter(&spec.source)?;
        let adapter = Adapter::open(&folder)?;
        adapter.check(config)?;
        let file = folder.join("tokenizer.json");
        if file.is_file()
            && let Some(model) = tokenizer()?
        {
            check_tokenizer(&file, &model)?;
        }
        adapters.push((adapter, spec.scale));
    }
    let adapters = Vec::from_iter(adapters.iter().map(|(adapter, scale)| (adapter, *scale)));
    Ok(Some(Adaptation::new(config, &adapters)?))
}

/// Refuses an adapter that was trained with other tokens than the model has.
fn check_tokenizer(file: &Path, model: &Tokenizer) -> anyhow::Result<()> {
    let adapter = Tokenizer::from_files(file, None, None, None)?;
    let ids = 0..model.vocab_size().max(adapter.vocab_size()) as u32;
    let shown = |token: Option<String>| match token {
        Some(token) => format!("`{}`", token.escape_debug()),
        None => "none".into(),
    };
    for id in ids {
        let (ours, theirs) = (model.id_to_token(id), adapter.id_to_token(id));
        if ours != theirs {
            bail!(
                "{}: token {id} is {} here and {} in the model's tokenizer: the adapter was trained with another one",
                file.display(),
                shown(theirs),
                shown(ours)
            );
        }
    }
    Ok(())
}

/// The model with the adapters beside it; it is the same one if there are none.
pub fn beside(model: Arc<Model>, adaptation: Option<&Adaptation>) -> anyhow::Result<Arc<Model>> {
    Ok(match adaptation {
        Some(adaptation) => Arc::new(model.adapted(&adaptation.to_device(model.device())?)?),
        None => model,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_follows_the_last_colon() {
        let parse = |text| AdapterSpec::parse(text).map(|spec| (spec.source, spec.scale));
        assert_eq!(parse("a/b"), Ok(("a/b".into(), 1.)));
        assert_eq!(parse("a/b:0.5"), Ok(("a/b".into(), 0.5)));
        assert_eq!(parse("a:b:-2"), Ok(("a:b".into(), -2.)));
        assert_eq!(parse(r"C:\a"), Ok((r"C:\a".into(), 1.)));
        assert!(parse("a:nan").unwrap_err().contains("no scale"));
        assert!(parse(":2").unwrap_err().contains("no scale"));
        assert!(parse("").is_err());
        let named = NamedAdapter::parse("mine=a/b:0.5").unwrap();
        assert_eq!(
            (named.name.as_deref(), named.spec.to_string()),
            (Some("mine"), "a/b:0.5".into())
        );
        assert_eq!(NamedAdapter::parse("a/b=c").unwrap().name, None);
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().display();
        assert!(parse(&format!("{text}:x")).unwrap_err().contains("no number"));
    }
}
