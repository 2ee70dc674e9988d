//! `bitnet perplexity`: how well a model foresees a text.

mod settings;

use std::{
    fs,
    io::{self, Write},
    num::NonZeroUsize,
    ops::ControlFlow,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, bail};
use bitnet_model::{
    model::Model,
    ops::KvType,
    perplexity::{Cut, Perplexity, Run, Window, perplexity},
};
use serde_json::{Value, json};

use crate::{
    adapter::{self, AdapterArgs},
    args::Global,
    interrupt,
    model::{ModelArgs, kv_type},
    progress,
    table::Table,
};
use settings::{Setting, Vary};

/// Options of `bitnet perplexity`.
#[derive(clap::Args)]
#[command(
    after_long_help = "The text is tokenized as a whole, with the special tokens that its tokenizer adds. With --method sliding every \
token but the first is scored once, in windows that overlap: with --window 512 --stride 256 each token has 256 tokens or more before \
it, except at the beginning of the text. With --method llama.cpp windows do not overlap, each begins with begin-of-text if the \
tokenizer adds that, and only its second half is scored. Figures compare only if model, text, method, window and stride are the \
same; bits per byte compare between tokenizers, too.

EXAMPLES

  What smaller heads and caches cost, in one table:
    bitnet perplexity wiki.txt -m MODEL --vary lm-head,kv-cache

  What an adapter changes:
    bitnet perplexity texts.txt -m MODEL --adapter DIR --vary adapter"
)]
pub struct Args {
    /// The text
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Which tokens are scored, with what before them
    #[arg(long, value_name = "METHOD", default_value = "sliding")]
    method: Method,
    /// Tokens that the model sees at once [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "TOKENS")]
    window: Option<NonZeroUsize>,
    /// Tokens from one window to the next [default: half a window]
    #[arg(long, value_name = "TOKENS")]
    stride: Option<NonZeroUsize>,
    /// Score only the first tokens of the text
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// How keys and values are stored [default: f16, with --low-memory int8]
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    kv_cache: Option<KvType>,
    /// Run again with every other output head, type of cache, or without adapters and with each alone, and print a table of what
    /// that changes; several are separated by commas
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    vary: Vec<Vary>,
    /// Print one JSON object: `perplexity`, `nll` (the mean, in nats), `bits_per_byte`, `tokens`, `bytes`, `method`, `window`,
    /// `stride`, `lm_head`, `kv_cache`, `adapters`, `seconds`; with --vary `varied`, a list of the same with `change` and `stderr`
    #[arg(long)]
    json: bool,
    /// The model
    #[command(flatten)]
    model: ModelArgs,
    /// Adapters.
    #[command(flatten)]
    adapters: AdapterArgs,
}

/// The values of `--method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    /// Every token once, as transformers' document does it
    Sliding,
    /// The second half of every window
    #[value(name = "llama.cpp")]
    LlamaCpp,
}

/// A run of the text.
struct Figures {
    setting: Setting,
    sum: Perplexity,
    /// Tokens scored in a window, and their Σ −ln p.
    windows: Vec<(usize, f64)>,
    seconds: f64,
}

/// The text as it is scored.
struct Text {
    tokens: Vec<u32>,
    windows: Vec<Window>,
    begin: Option<u32>,
    /// Of what is scored.
    bytes: usize,
    window: usize,
    stride: usize,
}

/// Runs it.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    if args.method == Method::LlamaCpp && args.stride.is_some() {
        bail!("--stride belongs to --method sliding: windows of llama.cpp do not overlap");
    }
    let text = args.text(global)?;
    let settings = Setting::all(args);
    let interrupt = interrupt::flag()?;
    let mut all: Vec<Figures> = Vec::with_capacity(settings.len());
    let mut loaded = None;
    for setting in settings {
        // Another cache needs no other model.
        let model = match loaded.take().zip(all.last()) {
            Some((model, last)) if setting.has_model_of(&last.setting) => model,
            _ => args.load(&setting, global)?,
        };
        all.push(args.score(&text, &model, setting, &interrupt, global)?);
        loaded = Some(model);
    }
    let mut out = io::stdout().lock();
    match (args.json, &args.vary[..]) {
        (true, _) => writeln!(out, "{}", args.to_json(&text, &all))?,
        (false, []) => writeln!(out, "{}", args.line(&text, &all[0]))?,
        (false, _) => {
            writeln!(out, "{}\n", args.line(&text, &all[0]))?;
            write!(out, "{}", table(&text, &all).markdown())?;
        }
    }
    Ok(())
}

impl Args {
    /// Reads and cuts the text.
    fn text(&self, global: &Global) -> anyhow::Result<Text> {
        let name = || self.file.display().to_string();
        let text = fs::read_to_string(&self.file).with_context(name)?;
        let source = self.model.open(global)?;
        let Some(tokenizer) = source.tokenizer()? else {
            bail!("{}: has no tokenizer, so it cannot read a text", source.name);
        };
        let window =
            self.window.or(NonZeroUsize::new(source.config.max_position_embeddings.min(512)));
        let window = window.context("the model has no context")?;
        let mut encoded = tokenizer.encode_with_bytes(&text)?;
        encoded.truncate(self.max_tokens.unwrap_or(usize::MAX));
        let (cut, stride) = match self.method {
            Method::Sliding => {
                let stride = self.stride.or(NonZeroUsize::new(window.get() / 2));
                let stride = stride
                    .context("a window of one token scores nothing: give at least --window 2")?;
                (Cut::Sliding { window, stride }, stride)
            }
            Method::LlamaCpp => (Cut::SecondHalves { window }, window),
        };
        let windows = cut.windows(encoded.len()).with_context(name)?;
        let scored = windows.iter().flat_map(|window| &encoded[window.scored.clone()]);
        let bos =
            tokenizer.bos_token_id().filter(|&bos| encoded.first().is_some_and(|t| t.0 == bos));
        Ok(Text {
            bytes: scored.map(|(_, bytes)| bytes).sum(),
            tokens: encoded.iter().map(|&(id, _)| id).collect(),
            windows,
            begin: bos.filter(|_| self.method == Method::LlamaCpp),
            window: window.get(),
            stride: stride.get(),
        })
    }

    /// Loads the model of a setting.
    fn load(&self, setting: &Setting, global: &Global) -> anyhow::Result<Arc<Model>> {
        let model = ModelArgs { lm_head: Some(setting.lm_head), ..self.model.clone() };
        let source = model.open(global)?;
        let adapters = AdapterArgs { adapters: setting.adapters.clone() };
        let adaptation = adapters.read(&source, global)?;
        adapter::beside(Arc::new(source.load(&global.device()?)?), adaptation.as_ref())
    }

    /// Runs the text.
    fn score(
        &self,
        text: &Text,
        model: &Model,
        setting: Setting,
        interrupt: &AtomicBool,
        global: &Global,
    ) -> anyhow::Result<Figures> {
        let all: usize = text.windows.iter().map(|window| window.scored.len()).sum();
        let bar = progress::bar(global, all, "{bar:30} {pos}/{len} tokens {msg} {eta}");
        bar.set_message(setting.to_string());
        let (start, mut windows) = (Instant::now(), Vec::new());
        let run = Run { kv_type: setting.kv_type, begin: text.begin };
        let sum = perplexity(model, &text.tokens, &text.windows, run, |window, nll| {
            windows.push((window.scored.len(), nll));
            bar.inc(window.scored.len() as u64);
            match interrupt.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        });
        bar.finish_and_clear();
        let sum = sum.with_context(|| self.file.display().to_string())?;
        if interrupt.load(Ordering::Relaxed) {
            interrupt::exit();
        }
        Ok(Figures { setting, sum, windows, seconds: start.elapsed().as_secs_f64() })
    }

    fn line(&self, text: &Text, figures: &Figures) -> String {
        let (sum, Setting { kv_type, lm_head, .. }) = (figures.sum, &figures.setting);
        let cut = match self.method {
            Method::Sliding => format!("window {}, stride {}", text.window, text.stride),
            Method::LlamaCpp => format!("second halves of windows of {}", text.window),
        };
        format!(
            "perplexity {:.4} over {} tokens, {:.4} bits per byte ({cut}, head {}, cache {}), {:.1} tokens/s",
            sum.value(),
            sum.tokens,
            sum.bits_per_byte(text.bytes),
            lm_head.name(),
            kv_type.name(),
            sum.tokens as f64 / figures.seconds
        )
    }

    fn to_json(&self, text: &Text, all: &[Figures]) -> Value {
        let method = match self.method {
            Method::Sliding => "sliding",
            Method::LlamaCpp => "llama.cpp",
        };
        let object = |figures: &Figures| {
            let Figures { setting, sum, seconds, .. } = figures;
            let adapters = Vec::from_iter(setting.adapters.iter().map(ToString::to_string));
            json!({
                "perplexity": sum.value(), "nll": sum.value().ln(), "bits_per_byte": sum.bits_per_byte(text.bytes),
                "tokens": sum.tokens, "bytes": text.bytes, "method": method, "window": text.window, "stride": text.stride,
                "lm_head": setting.lm_head.name(), "kv_cache": setting.kv_type.name(), "adapters": adapters,
                "seconds": seconds,
            })
        };
        let mut base = object(&all[0]);
        if !self.vary.is_empty() {
            let varied = all[1..].iter().map(|figures| {
                let (change, error) = change(&all[0], figures);
                let mut object = object(figures);
                (object["change"], object["stderr"]) = (json!(change), json!(error));
                object
            });
            base["varied"] = varied.collect();
        }
        base
    }
}

/// The table of `--vary`.
fn table(text: &Text, all: &[Figures]) -> Table {
    let header = [
        "Head",
        "Cache",
        "Adapters",
        "Perplexity",
        "Bits per byte",
        "Change",
        "",
        "Stderr",
        "Tokens/s",
    ];
    let mut table = Table::new("Perplexity by setting", &header, &[3, 4, 5, 7, 8]);
    for (index, figures) in all.iter().enumerate() {
        let (change, error) = change(&all[0], figures);
        let setting = &figures.setting;
        let is_base = index == 0;
        let percent = |value: f64| format!("{:.3} %", 100. * value);
        table.rows.push(vec![
            setting.lm_head.name().into(),
            setting.kv_type.name().into(),
            setting.adapter_names(),
            format!("{:.4}", figures.sum.value()),
            format!("{:.4}", figures.sum.bits_per_byte(text.bytes)),
            if is_base { String::new() } else { format!("{:+.3} %", 100. * change) },
            if is_base { "" } else { "±" }.into(),
            if is_base { String::new() } else { error.map_or("N/A".into(), percent) },
            format!("{:.1}", figures.sum.tokens as f64 / figures.seconds),
        ]);
    }
    table
}

/// By what part of itself the perplexity changes, and the standard error of that, from the differences of the same windows.
/// `None` for a single window.
fn change(base: &Figures, other: &Figures) -> (f64, Option<f64>) {
    let tokens = base.sum.tokens as f64;
    let mean = (other.sum.nll - base.sum.nll) / tokens;
    let count = base.windows.len();
    let pairs = base.windows.iter().zip(&other.windows);
    // The error of a mean whose parts are windows of different lengths (a ratio estimate).
    let squares =
        pairs.map(|(&(tokens, base), &(_, other))| (other - base - mean * tokens as f64).powi(2));
    let error = (squares.sum::<f64>() * count as f64 / (count as f64 - 1.)).sqrt() / tokens;
    let ratio = mean.exp();
    (ratio - 1., (count > 1).then_some(ratio * error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::LmHead;

    fn figures(windows: &[(usize, f64)]) -> Figures {
        let setting =
            Setting { lm_head: LmHead::Exact, kv_type: KvType::F32, adapters: Vec::new() };
        let tokens = windows.iter().map(|window| window.0).sum();
        let nll = windows.iter().map(|window| window.1).sum();
        Figures { setting, sum: Perplexity { tokens, nll }, windows: windows.to_vec(), seconds: 1. }
    }

    #[test]
    fn changes_by_hand() {
        let base = figures(&[(2, 3.), (2, 5.)]);
        assert_eq!(change(&base, &base), (0., Some(0.)));
        // The mean grows by (1 + 3) / 4; the windows are off that by ∓1: √(2 · 2 / 1) / 4.
        let (change_, error) = change(&base, &figures(&[(2, 4.), (2, 8.)]));
        assert!((change_ - (1f64.exp() - 1.)).abs() < 1e-12);
        assert!((error.unwrap() - 0.5 * 1f64.exp()).abs() < 1e-12);
        assert_eq!(change(&figures(&[(2, 3.)]), &figures(&[(2, 3.)])), (0., None));
    }
}
