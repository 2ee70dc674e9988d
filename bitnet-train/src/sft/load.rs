//! Files of records → examples.

use std::{cell::Cell, ops::ControlFlow, path::Path};

use bitnet_model::{
    hub::Hub,
    pretrained::{DEFAULT, Precision, Source},
    text::{ChatTemplate, Span, Tokenizer},
};
use rayon::prelude::*;
use serde_json::Value;

use super::{
    Example, Examples, Format, Report, Template,
    encode::{Encoded, Encoder},
    prompt::spans,
    record::sample,
};
use crate::{
    Error, Result,
    dataset::{Corpus, Dataset, Progress, RecordSink, Refusal, Stage, Vocabulary, read_records},
    fingerprint::place,
    recipe::{Data, Recipe},
};

/// Text encoded at a time, by all threads; between two of these progress is told.
const BATCH_BYTES: usize = 1 << 20;

/// Malformed records that a report shows.
const SHOWN: usize = 5;

/// What `[data]` of `recipe` says, where it has a `format`: records, read and encoded into memory.
///
/// # Errors
/// Those of [`Dataset::open_with`]; a record that is malformed, with its file and place; no example.
pub(crate) fn open(
    recipe: &Recipe,
    hub: &Hub,
    observe: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Dataset> {
    let data = &recipe.data;
    let Some(path) = &data.tokenizer else {
        return Err(Error::recipe("data.tokenizer", "records are written for a model's tokenizer"));
    };
    let vocabulary = Vocabulary::from_file(path)?;
    let tokenizer = tokenizer(path)?;
    let template = template(data, &tokenizer)?;
    let mut loader = Loader {
        data,
        template: template.as_ref(),
        encoder: Encoder {
            tokenizer: &tokenizer,
            eos: vocabulary.eos(),
            loss_on: data.loss_on.unwrap_or_default(),
            max_length: data.sequence_length,
        },
        report: Report { has_template: template.is_some(), ..Report::default() },
        observe,
    };
    let train = loader.read(&Corpus::open(&data.train, hub)?, data.max_samples, Stage::Train)?;
    let (train, validation) = match data.validation_split {
        Some(share) => split(train, share, recipe.train.seed)?,
        None => {
            let corpus = Corpus::open(&data.validation, hub)?;
            (train, loader.read(&corpus, None, Stage::Validation)?)
        }
    };
    let Loader { mut report, .. } = loader;
    report.is_detected = data.format == Some(Format::Auto);
    let examples = |examples: Vec<Example>, what: &str| match examples.is_empty() {
        true => Err(Error::Dataset(format!("no example is left to {what}: {}", report.losses()))),
        false => Examples::new(examples),
    };
    let (train, validation) = (examples(train, "train on")?, examples(validation, "evaluate on")?);
    let report = Some(report);
    Ok(Dataset { vocabulary, train: train.into(), validation: validation.into(), report })
}

/// The tokenizer of `path` with what lies beside it: special tokens and chat template.
pub(crate) fn tokenizer(path: &Path) -> Result<Tokenizer> {
    if path.as_os_str() == DEFAULT {
        let source = Source::open(DEFAULT, Precision::AsConfigured, &Hub::from_env())?;
        let missing = || Error::Tokenizer("the embedded model has no tokenizer".into());
        return source.tokenizer()?.ok_or_else(missing);
    }
    let beside = |name: &str| Some(path.with_file_name(name)).filter(|path| path.is_file());
    let files = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
    let [config, special_tokens, template] = files.map(beside);
    let (config, special_tokens) = (config.as_deref(), special_tokens.as_deref());
    Ok(Tokenizer::from_files(path, config, special_tokens, template.as_deref())?)
}

/// The template that `data.chat_template` names, else that of the tokenizer.
pub(crate) fn template(data: &Data, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let refuse = |reason: String| Error::recipe("data.chat_template", reason);
    match &data.chat_template {
        Some(Template::None) => Ok(None),
        Some(Template::File(path)) => {
            let source = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let tokenizer = tokenizer
                .with_chat_template(&source)
                .map_err(|error| refuse(format!("{}: {error}", path.display())))?;
            Ok(tokenizer.chat_template()?.cloned())
        }
        None => {
            let template = tokenizer.chat_template();
            let advice = "name another file, or `none`";
            Ok(template
                .map_err(|error| refuse(format!("the model's: {error}; {advice}")))?
                .cloned())
        }
    }
}

/// What is trained on, and the share that is held out: at least one, chosen by `seed`.
fn split(examples: Vec<Example>, share: f64, seed: u64) -> Result<(Vec<Example>, Vec<Example>)> {
    let count = examples.len();
    if count < 2 {
        let reason = format!("{count} examples cannot be split; give `[[data.validation]]`");
        return Err(Error::recipe("data.validation_split", reason));
    }
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&index| place(seed, index as u64));
    let held_out = ((count as f64 * share).round() as usize).clamp(1, count - 1);
    let mut is_held_out = vec![false; count];
    order[..held_out].iter().for_each(|&index| is_held_out[index] = true);
    let (validation, train): (Vec<_>, Vec<_>) =
        examples.into_iter().zip(is_held_out).partition(|(_, is_held_out)| *is_held_out);
    let examples = |pairs: Vec<(Example, bool)>| pairs.into_iter().map(|pair| pair.0).collect();
    Ok((examples(train), examples(validation)))
}

struct Loader<'a> {
    data: &'a Data,
    template: Option<&'a ChatTemplate>,
    encoder: Encoder<'a>,
    report: Report,
    observe: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
}

impl Loader<'_> {
    /// The examples of the first `limit` records of `corpus`.
    fn read(
        &mut self,
        corpus: &Corpus,
        limit: Option<usize>,
        stage: Stage,
    ) -> Result<Vec<Example>> {
        let done = Cell::new(0);
        let mut records = Records {
            loader: self,
            field: String::new(),
            left: limit.unwrap_or(usize::MAX),
            is_empty: true,
            is_refused: false,
            progress: (&done, corpus.bytes(), stage),
            waiting: Vec::new(),
            bytes: 0,
            examples: Vec::new(),
        };
        'sources: for (source, files) in corpus.sources() {
            records.is_empty = true;
            records.field.clone_from(&source.field);
            for file in files {
                let read = read_records(file, &done, &mut records);
                let flow = read.map_err(|error| match error {
                    Error::Corpus { path, reason } if records.is_refused => {
                        let advice = "correct it, or leave out such records with `data.skip_bad`";
                        Error::Corpus { path, reason: format!("{reason}; {advice}") }
                    }
                    other => other,
                })?;
                records.flush()?;
                if flow.is_break() {
                    break 'sources;
                }
            }
            if records.is_empty {
                return Err(source.refuse("holds no record"));
            }
        }
        Ok(records.examples)
    }
}

/// Records on their way: one after another they become text, many at a time tokens.
struct Records<'a, 'b> {
    loader: &'a mut Loader<'b>,
    /// The key of a plain text.
    field: String,
    /// Records that may still be taken.
    left: usize,
    /// No record was found in this source, not even a malformed one.
    is_empty: bool,
    /// A malformed record has ended the reading.
    is_refused: bool,
    /// Bytes read so far and in all, and what for.
    progress: (&'a Cell<u64>, u64, Stage),
    waiting: Vec<Vec<Span>>,
    bytes: usize,
    examples: Vec<Example>,
}

impl RecordSink for Records<'_, '_> {
    fn take(&mut self, record: Value) -> Result<ControlFlow<()>, Refusal> {
        let Loader { data, template, report, .. } = &mut *self.loader;
        self.is_empty = false;
        let format = data.format.unwrap_or(Format::Auto);
        let (form, sample) = sample(record, format, &self.field).map_err(Refusal::Malformed)?;
        let spans = spans(sample, *template).map_err(Refusal::Malformed)?;
        *report.forms.entry(form).or_default() += 1;
        self.bytes += spans.iter().map(|span| span.text.len()).sum::<usize>();
        self.waiting.push(spans);
        if self.bytes >= BATCH_BYTES {
            self.flush()?;
        }
        self.left -= 1;
        Ok(if self.left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn skips(&mut self, path: &Path, place: &str, reason: &str) -> bool {
        let Loader { data, report, .. } = &mut *self.loader;
        if !data.skip_bad.unwrap_or(false) {
            self.is_refused = true;
            return false;
        }
        self.is_empty = false;
        report.bad += 1;
        if report.bad_shown.len() < SHOWN {
            report.bad_shown.push(format!("{}: {place}: {reason}", path.display()));
        }
        true
    }
}

impl Records<'_, '_> {
    /// Encodes what waits, in parallel; the examples keep the order of their records.
    fn flush(&mut self) -> Result<()> {
        let Loader { encoder, report, .. } = &mut *self.loader;
        let encode = |spans: &Vec<Span>| encoder.encode(spans);
        let encoded: Vec<_> = self.waiting.par_iter().map(encode).collect();
        for encoded in encoded {
            let Encoded { example, length, cut } = encoded?;
            report.longest = report.longest.max(length);
            report.cut += usize::from(cut > 0);
            report.cut_tokens += cut;
            match example {
                Some(example) => self.examples.push(example),
                None => report.dropped += 1,
            }
        }
        self.waiting.clear();
        self.bytes = 0;
        let (done, total, stage) = self.progress;
        let progress = Progress { stage, done: done.get(), total };
        match (self.loader.observe)(progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }
}
