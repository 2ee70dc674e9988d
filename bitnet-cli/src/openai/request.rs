//! A request as sequences to be continued.

use std::{collections::BTreeMap, num::NonZeroUsize, sync::Arc};

use bitnet_model::{
    adapter::Adaptation,
    batch::Sequence,
    config::{Config, GenerationConfig},
    grammar::GrammarFactory,
    text::{StopStrings, Tokenizer},
};
use serde_json::Value;

use super::{
    Refusal, Route, conversation,
    fields::{Fields, wrong},
    format,
    tools::Tools,
};
use crate::{
    continuation::check_prompt,
    sampling::{MaxNewTokens, Plan, SamplingArgs},
};

/// New tokens of a reply, and of a text, if neither the request nor the model's publisher says how many.
const REPLY_TOKENS: usize = 512;
const TEXT_TOKENS: u64 = 16;
/// The most choices of a request, likeliest tokens of a place, and stop strings, as OpenAI has it but for the last.
const MOST_CHOICES: u64 = 128;
const MOST_TOP_LOGPROBS: u64 = 20;
const MOST_STOPS: usize = 64;
/// Every piece of an answer says the name of the model.
const MOST_MODEL_BYTES: usize = 256;

/// What requests are read with.
pub struct Reader<'a> {
    /// The model's name, for answers to requests that give it none.
    pub model: &'a str,
    /// What a request may name instead of the model, or behind it and a colon.
    pub adapters: &'a BTreeMap<String, Arc<Adaptation>>,
    /// Of the model.
    pub tokenizer: &'a Tokenizer,
    /// Of the model.
    pub config: &'a Config,
    /// Of its vocabulary.
    pub grammars: &'a GrammarFactory,
    /// What its publisher recommends, where a request says nothing.
    pub generation: &'a GenerationConfig,
    /// How much a request may ask for.
    pub limits: Lengths,
}

/// How long texts may be, and how many.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Tokens of a prompt.
    pub prompt: usize,
    /// New tokens; where a request says nothing, it gets no more than these.
    pub new: usize,
    /// Choices of a request, of all its prompts.
    pub texts: usize,
    /// Bytes of a prompt: longer ones are refused before they are read.
    pub bytes: usize,
}

impl Lengths {
    /// As long as the model's context allows.
    pub const ANY: Self =
        Self { prompt: usize::MAX, new: usize::MAX, texts: usize::MAX, bytes: usize::MAX };
}

/// What a request asks for.
pub struct Asked {
    /// Which kind of answer.
    pub route: Route,
    /// The name of the model in the answer.
    pub model: String,
    /// To be continued, one for each choice of the answer.
    pub sequences: Vec<Sequence>,
    /// Prompts of the choices, one after the other, have so many choices each.
    pub n: usize,
    /// Where texts end besides.
    pub stop: StopStrings,
    /// Whether a text begins with its prompt.
    pub echo: bool,
    /// Whether texts may be calls of functions.
    pub calls: bool,
    /// Whether the answer is to come in pieces.
    pub stream: Option<StreamOptions>,
    /// Whether the same request gets the same answer again.
    pub is_deterministic: bool,
}

/// How an answer comes in pieces.
#[derive(Clone, Copy, Debug)]
pub struct StreamOptions {
    /// Whether the last one says how many tokens it took.
    pub usage: bool,
}

impl StreamOptions {
    /// `stream` and `stream_options`.
    fn read(fields: Fields<'_>) -> Result<Option<Self>, Refusal> {
        const NAME: &str = "stream_options";
        let stream = fields.flag("stream")?.unwrap_or(false);
        let Some(options) = fields.any(NAME) else {
            return Ok(stream.then_some(Self { usage: false }));
        };
        if !options.is_object() {
            return Err(wrong(NAME, options, "an object"));
        }
        if !stream {
            return Err(Refusal::of(NAME, format!("`{NAME}` needs `stream`: true")));
        }
        let usage = Fields::new(options)?.flag("include_usage");
        let usage = usage
            .map_err(|refusal| Refusal::of("stream_options.include_usage", refusal.message))?;
        Ok(Some(Self { usage: usage.unwrap_or(false) }))
    }
}

impl Reader<'_> {
    /// Reads the body of a request. Unknown fields are overlooked.
    ///
    /// # Errors
    /// The first field that cannot be answered.
    pub fn read(&self, route: Route, body: &Value) -> Result<Asked, Refusal> {
        let fields = Fields::new(body)?;
        for name in ["suffix", "functions", "audio"] {
            fields.refuse(name)?;
        }
        let stream = StreamOptions::read(fields)?;
        let model = fields.text("model")?.unwrap_or(self.model).to_owned();
        let adapter = self.adapter(&model)?;
        let n = at_most(fields, "n", MOST_CHOICES)?.unwrap_or(1);
        let best_of = fields.count("best_of")?.unwrap_or(n);
        if n == 0 || best_of != n {
            let reason = format!(
                "`n` is {n} and `best_of` {best_of}, but all choices are returned, at least one"
            );
            return Err(Refusal::of(if n == 0 { "n" } else { "best_of" }, reason));
        }
        let echo = fields.flag("echo")?.unwrap_or(false) && route == Route::Completion;
        let logprobs = self.logprobs(route, fields)?;
        let plan = self.plan(route, fields)?;
        let tools = match route {
            Route::Chat => Tools::read(fields)?,
            Route::Completion => fields.refuse("tools").map(|()| None)?,
        };
        let schema = format::schema(fields)?;
        let grammar = match (&tools, &schema) {
            (Some(tools), schema) => Some(tools.grammar(schema.as_ref(), self.grammars)?),
            (None, Some(schema)) => Some(format::grammar(schema, self.grammars)?),
            (None, None) => None,
        };
        let prompts = match route {
            Route::Chat => vec![self.conversation(fields, tools.as_ref())?],
            // Few bytes can ask for very many choices: they are counted before there is any.
            Route::Completion => self.prompts(fields, "prompt", self.limits.texts / n as usize)?,
        };
        let mut sequences = Vec::new();
        for prompt in prompts {
            let param = if route == Route::Chat { "messages" } else { "prompt" };
            self.check(param, &prompt)?;
            sequences.extend((0..n).map(|choice| Sequence {
                prompt: prompt.clone(),
                sampler: plan.options.sampler.clone(),
                seed: plan.seed.wrapping_add(choice),
                max_new_tokens: plan.options.max_new_tokens,
                eos_token_ids: plan.options.eos_token_ids.clone(),
                grammar: grammar.clone(),
                adapter: adapter.cloned(),
                logprobs,
                prompt_logprobs: echo && logprobs.is_some(),
                pooled: false,
            }));
        }
        let is_deterministic =
            plan.options.sampler.params().temperature == 0. || fields.any("seed").is_some();
        let (n, stop, calls) = (n as usize, plan.stop, tools.is_some());
        Ok(Asked { route, model, sequences, n, stop, echo, calls, stream, is_deterministic })
    }

    /// Refuses a text that has more tokens than allowed, however long they are.
    fn check_bytes(&self, param: &str, text: &str) -> Result<(), Refusal> {
        let (len, most) = (text.len(), self.limits.bytes);
        if len > most {
            let reason = format!(
                "the prompt has {len} bytes, more than the {most} that fit the model's context"
            );
            return Err(Refusal::of(param, reason));
        }
        Ok(())
    }

    /// Refuses a prompt that the model cannot run, or that is longer than allowed.
    pub(super) fn check(&self, param: &str, prompt: &[u32]) -> Result<(), Refusal> {
        if prompt.is_empty() {
            return Err(Refusal::of(param, "the prompt has no tokens"));
        }
        check_prompt(prompt, self.config).map_err(|e| Refusal::of(param, e.to_string()))?;
        let (len, most) = (prompt.len(), self.limits.prompt);
        if len > most {
            let reason = format!("the prompt has {len} tokens, but {most} are allowed here");
            return Err(Refusal::of(param, reason));
        }
        Ok(())
    }

    /// The adapter that a request names. Where there are none, a model may have any name.
    pub(super) fn adapter(&self, model: &str) -> Result<Option<&Arc<Adaptation>>, Refusal> {
        if model.len() > MOST_MODEL_BYTES {
            let len = model.len();
            let reason =
                format!("`model` has {len} bytes, but at most {MOST_MODEL_BYTES} are allowed");
            return Err(Refusal::of("model", reason));
        }
        let name = model.rsplit_once(':').map_or(model, |(_, name)| name);
        match self.adapters.get(name) {
            None if model != self.model
                && (!self.adapters.is_empty() || self.is_qualified(model)) =>
            {
                let names = self.adapters.keys().map(|name| format!(", {}:{name}", self.model));
                let reason = format!(
                    "there is no model `{model}`: there is {}{}",
                    self.model,
                    names.collect::<String>()
                );
                Err(Refusal::of("model", reason))
            }
            adapter => Ok(adapter),
        }
    }

    /// Whether a name is that of an adapter beside the model.
    fn is_qualified(&self, name: &str) -> bool {
        name.strip_prefix(self.model).is_some_and(|rest| rest.starts_with(':'))
    }

    /// How the text is to go on, as the command line has it.
    fn plan(&self, route: Route, fields: Fields<'_>) -> Result<Plan, Refusal> {
        let stop = fields.texts("stop")?;
        if stop.len() > MOST_STOPS {
            let reason =
                format!("`stop` has {} strings, but at most {MOST_STOPS} are allowed", stop.len());
            return Err(Refusal::of("stop", reason));
        }
        let length = match fields.count("max_completion_tokens")? {
            Some(length) => Some(length),
            None => fields.count("max_tokens")?,
        };
        let length = length
            .or((route == Route::Completion).then_some(TEXT_TOKENS.min(self.limits.new as u64)));
        if let Some(length) = length.filter(|length| *length > self.limits.new as u64) {
            let name = ["max_completion_tokens", "max_tokens"]
                .into_iter()
                .find(|name| fields.any(name).is_some());
            let name = name.unwrap_or("max_tokens");
            let reason =
                format!("`{name}` is {length}, but at most {} are allowed here", self.limits.new);
            return Err(Refusal::of(name, reason));
        }
        let length = length.map(|length| length as usize);
        let args = SamplingArgs {
            temperature: fields.number("temperature")?,
            top_k: fields.count("top_k")?.map(|k| k as usize),
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(0.),
            presence_penalty: fields.number("presence_penalty")?.unwrap_or(0.),
            logit_bias: self.logit_bias(fields)?,
            seed: fields.bits("seed")?,
            stop,
        };
        let bound =
            MaxNewTokens { flag: length.and_then(NonZeroUsize::new), default: REPLY_TOKENS };
        let plan = args.resolve(self.config, self.generation, bound);
        let mut plan = plan.map_err(|error| {
            let message = error.to_string();
            let param = message.split_whitespace().next().unwrap_or_default().to_owned();
            Refusal { param: fields.any(&param).map(|_| param), message }
        })?;
        let new = &mut plan.options.max_new_tokens;
        *new = if length == Some(0) { 0 } else { (*new).min(self.limits.new) };
        Ok(plan)
    }

    /// `{"ID": bias}`.
    fn logit_bias(&self, fields: Fields<'_>) -> Result<Vec<(u32, f32)>, Refusal> {
        const NAME: &str = "logit_bias";
        let Some(value) = fields.any(NAME) else { return Ok(Vec::new()) };
        let expected = "an object of token ids with numbers from -100 to 100";
        let Some(biases) = value.as_object() else { return Err(wrong(NAME, value, expected)) };
        let read = |(id, bias): (&String, &Value)| {
            let (id, bias) = (id.parse::<u32>().ok()?, bias.as_f64()?);
            let fits = (id as usize) < self.config.vocab_size && (-100. ..=100.).contains(&bias);
            fits.then_some((id, bias as f32))
        };
        let entry = |entry: (&String, &Value)| {
            read(entry).ok_or_else(|| {
                let (id, bias) = entry;
                Refusal::of(NAME, format!("`{NAME}` has `{id}`: {bias}, but must be {expected}, of a vocabulary of {}", self.config.vocab_size))
            })
        };
        biases.iter().map(entry).collect()
    }

    /// How many of the likeliest tokens are asked for, if log-probabilities are.
    fn logprobs(&self, route: Route, fields: Fields<'_>) -> Result<Option<usize>, Refusal> {
        let count = match route {
            Route::Chat => {
                let count = at_most(fields, "top_logprobs", MOST_TOP_LOGPROBS)?;
                match (fields.flag("logprobs")?.unwrap_or(false), count) {
                    (true, count) => Some(count.unwrap_or(0)),
                    (false, None) => None,
                    (false, Some(_)) => {
                        return Err(Refusal::of(
                            "top_logprobs",
                            "`top_logprobs` needs `logprobs`: true",
                        ));
                    }
                }
            }
            Route::Completion => at_most(fields, "logprobs", MOST_TOP_LOGPROBS)?,
        };
        Ok(count.map(|count| count as usize))
    }

    /// The tokens of a conversation.
    fn conversation(&self, fields: Fields<'_>, tools: Option<&Tools>) -> Result<Vec<u32>, Refusal> {
        const NAME: &str = "messages";
        let refuse = |reason: String| Refusal::of(NAME, reason);
        let Some(messages) = fields.any(NAME) else {
            return Err(refuse("there are no `messages`".into()));
        };
        let template = match self.tokenizer.chat_template() {
            Ok(Some(template)) => template,
            Ok(None) => {
                return Err(refuse("the model has no chat template: ask /v1/completions".into()));
            }
            Err(error) => return Err(refuse(error.to_string())),
        };
        let text = conversation::prompt(messages, tools, template)?;
        self.check_bytes(NAME, &text)?;
        self.tokenizer.encode_prompt(&text).map_err(|error| refuse(error.to_string()))
    }

    /// The tokens of `prompt` or of `messages`, as `/tokenize` has them.
    ///
    /// # Errors
    /// The field that has no tokens, or another type than expected.
    pub fn read_tokens(&self, body: &Value) -> Result<Vec<u32>, Refusal> {
        let fields = Fields::new(body)?;
        let special = fields.flag("add_special_tokens")?.unwrap_or(true);
        match fields.text("prompt")? {
            Some(text) => {
                let ids = self.tokenizer.encode(text, special);
                ids.map_err(|error| Refusal::of("prompt", error.to_string()))
            }
            None if fields.any("messages").is_some() => self.conversation(fields, None),
            None => Err(Refusal::of("prompt", "there is no `prompt`, and there are no `messages`")),
        }
    }

    /// Whether `/tokenize` is to spell these tokens, too.
    ///
    /// # Errors
    /// Another type than expected.
    pub fn spells_tokens(&self, body: &Value) -> Result<bool, Refusal> {
        Ok(Fields::new(body)?.flag("return_token_strs")?.unwrap_or(false))
    }

    /// The tokens of texts: a text, several, ids, or several lists of these; of no more than `most` texts.
    pub(super) fn prompts(
        &self,
        fields: Fields<'_>,
        name: &str,
        most: usize,
    ) -> Result<Vec<Vec<u32>>, Refusal> {
        let expected = "a string, a list of strings, a list of token ids, or a list of such lists";
        let Some(value) = fields.any(name) else {
            return Err(Refusal::of(name, format!("there is no `{name}`")));
        };
        let encode = |text: &str| {
            self.check_bytes(name, text)?;
            self.tokenizer.encode(text, true).map_err(|error| Refusal::of(name, error.to_string()))
        };
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = |values: &Vec<Value>| values.iter().map(id).collect::<Option<Vec<u32>>>();
        match value {
            Value::String(text) => Ok(vec![encode(text)?]),
            Value::Array(values) if !values.is_empty() => {
                if let Some(ids) = ids(values) {
                    return Ok(vec![ids]);
                }
                if values.len() > most {
                    let len = values.len();
                    let reason = format!(
                        "`{name}` has {len} texts, but at most {most} are taken at once (fewer, the more choices each has)"
                    );
                    return Err(Refusal::of(name, reason));
                }
                let each = |value: &Value| match value {
                    Value::String(text) => encode(text),
                    Value::Array(values) => ids(values).ok_or_else(|| wrong(name, value, expected)),
                    _ => Err(wrong(name, value, expected)),
                };
                values.iter().map(each).collect()
            }
            _ => Err(wrong(name, value, expected)),
        }
    }
}

/// A whole number with a largest value.
fn at_most(fields: Fields<'_>, name: &str, most: u64) -> Result<Option<u64>, Refusal> {
    let value = fields.count(name)?;
    match value.filter(|value| *value > most) {
        Some(value) => {
            Err(Refusal::of(name, format!("`{name}` is {value}, but must be at most {most}")))
        }
        None => Ok(value),
    }
}
