//! A request that is being answered: sequences in the engine on one side, choices of an answer on the other.

use std::{ops::ControlFlow, sync::Arc, time::Instant};

use bitnet_model::batch::Update;
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    app::{App, Loaded},
    engine::{Event, Ticket},
    error::{ApiError, Result},
    guard::Caller,
    watch::Record,
};
use crate::{
    adapter::NamedAdapters,
    openai::{Asked, Choice, Route},
};

/// Dropping it cancels what still runs.
pub struct Answering {
    pub app: Arc<App>,
    pub loaded: Arc<Loaded>,
    pub asked: Asked,
    pub choices: Vec<Choice>,
    ticket: Ticket,
    record: Arc<Record>,
}

/// What a request is answered with.
pub struct Context {
    pub app: Arc<App>,
    pub loaded: Arc<Loaded>,
    pub caller: Caller,
    pub record: Arc<Record>,
    /// Few are read at once; until it is read.
    pub turn: Arc<OwnedSemaphorePermit>,
}

impl Context {
    /// Does work that takes longer than others should wait for: texts are long, and templates and schemas of strangers
    /// can take their time.
    pub async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&App, &Loaded) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (app, loaded, turn) = (self.app.clone(), self.loaded.clone(), self.turn.clone());
        let work = move || {
            let _turn = turn; // until the work is done, even if the client has gone
            work(&app, &loaded)
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| ApiError::internal(&error.into()))?
    }
}

/// Cleans a request's body, refuses what must not come in, and notes its texts, those in the field of this name.
pub fn look_through(
    (app, loaded): (&App, &Loaded),
    body: &mut Value,
    texts: &str,
    record: &Record,
) -> Result<()> {
    if let Some(sanitizer) = &loaded.sanitizer {
        sanitizer.clean(body);
    }
    let texts = body.get(texts).unwrap_or(&Value::Null);
    check_input(app, texts)?;
    if app.policy.log_prompts {
        record.note(|details| details.prompt = Some(texts.to_string()));
    }
    Ok(())
}

/// Understands a request.
pub async fn read(context: &Context, route: Route, mut body: Value) -> Result<Asked> {
    let record = context.record.clone();
    let read = move |app: &App, loaded: &Loaded| {
        let texts = if route == Route::Chat { "messages" } else { "prompt" };
        look_through((app, loaded), &mut body, texts, &record)?;
        let adapters = loaded.adapters.get();
        let asked = loaded.reader(&app.model, &adapters).read(route, &body)?;
        note_model(app, &adapters, &asked.model, &record);
        Ok(asked)
    };
    context.off_thread(read).await
}

/// Counts the adapter that a request names.
pub fn note_model(app: &App, adapters: &NamedAdapters, model: &str, record: &Record) {
    let name = model.rsplit(':').next().unwrap_or_default();
    if adapters.contains_key(name) {
        app.watch.adapter(name);
    }
    record.note(|details| details.model = Some(model.to_owned()));
}

/// Refuses texts that the operator lets not in, wherever they are in a value.
fn check_input(app: &App, value: &Value) -> Result<()> {
    let Some(filter) = &app.policy.deny_input else { return Ok(()) };
    match value {
        Value::String(text) if filter.find(text).is_some() => {
            let message = "the request has a text that this server does not take in";
            Err(ApiError::bad(message).code("content_filter").blocked("filter_input"))
        }
        Value::Array(values) => values.iter().try_for_each(|value| check_input(app, value)),
        Value::Object(fields) => fields.values().try_for_each(|value| check_input(app, value)),
        _ => Ok(()),
    }
}

/// What becomes of a sequence that is not the end of its request.
pub enum News {
    /// It runs; so many tokens of its prompt need not be.
    Joined(usize),
    /// Of its batch; it has not failed.
    Update(Update),
}

/// Waits for news of a sequence, or for what ends its request, and says of which.
///
/// # Errors
/// If nothing comes any more.
pub async fn news(ticket: &mut Ticket, app: &App) -> Result<(usize, Result<News>)> {
    let failed =
        |reason: String| ApiError::internal(&anyhow::anyhow!("the engine failed: {reason}"));
    let Some((index, event)) = ticket.next().await else {
        return Err(failed("it fell silent".into()));
    };
    let news = match event {
        Event::Joined(reused) => Ok(News::Joined(reused)),
        Event::Refused(reason) | Event::Update(Update::Failed(reason)) => {
            Err(ApiError::bad(reason))
        }
        Event::Update(update) => Ok(News::Update(update)),
        Event::Expired => Err(ApiError::expired(app.policy.request_timeout)),
        Event::Broken(reason) => Err(failed(reason)),
    };
    Ok((index, news))
}

impl Answering {
    /// Hands the sequences to the engine, and waits until the first of them runs or cannot.
    pub async fn start(context: Context, asked: Asked) -> Result<Self> {
        let Context { app, loaded, caller, record, turn } = context;
        drop(turn);
        let prompts = asked.sequences.iter().step_by(asked.n);
        let prompt_tokens: usize = prompts.map(|sequence| sequence.prompt.len()).sum();
        let most_new: usize = asked.sequences.iter().map(|sequence| sequence.max_new_tokens).sum();
        let taken = app.rates.tokens(&caller.client, prompt_tokens.saturating_add(most_new));
        taken.map_err(|exceeded| ApiError::rate(exceeded, "tokens"))?;
        record.note(|details| details.prompt_tokens = prompt_tokens);
        let choices = asked.sequences.iter();
        let choices = choices.map(|sequence| Choice::new(&asked, sequence, &loaded.tokenizer));
        let choices = choices.collect::<anyhow::Result<_>>();
        let choices = choices.map_err(|error| ApiError::internal(&error))?;
        let deadline = Instant::now() + app.policy.request_timeout;
        let sequences = asked.sequences.clone();
        let ticket = loaded.engine.submit(sequences, &caller.client, deadline)?;
        let mut answering = Self { app, loaded, asked, choices, ticket, record };
        if !answering.choices.is_empty() {
            let (index, first) = news(&mut answering.ticket, &answering.app).await?;
            answering.take(index, first)?;
        }
        Ok(answering)
    }

    /// Waits for news of a choice, and says of which; `None` when all have ended.
    pub async fn next(&mut self) -> Result<Option<usize>> {
        while !self.choices.iter().all(Choice::is_ended) {
            let (index, news) = news(&mut self.ticket, &self.app).await?;
            if self.take(index, news)? {
                return Ok(Some(index));
            }
        }
        let finish = self.choices.first().map(|choice| choice.finish_reason(false));
        let finish = finish.as_ref().and_then(Value::as_str).map(String::from);
        self.record.note(|details| details.finish = finish);
        Ok(None)
    }

    /// Takes what becomes of a sequence, and says whether there is news for the client.
    fn take(&mut self, index: usize, news: Result<News>) -> Result<bool> {
        let choice = &mut self.choices[index];
        if choice.is_ended() {
            return Ok(false);
        }
        let update = match news? {
            News::Update(update) => update,
            News::Joined(reused) => {
                choice.join(reused);
                return Ok(false);
            }
        };
        let internal = |error: anyhow::Error| ApiError::internal(&error);
        match update {
            Update::Prompt(_, logprobs) => {
                choice.push_prompt(logprobs);
                return Ok(false);
            }
            Update::Token(id, logprobs) => {
                self.record.note(|details| details.new_tokens += 1);
                if choice.push(id, logprobs).map_err(internal)? == ControlFlow::Break(()) {
                    self.ticket.cancel(index);
                }
            }
            Update::End(finish) => choice.end(finish).map_err(internal)?,
            Update::Pooled(_) | Update::Failed(_) => return Ok(false),
        }
        let denied = self.app.policy.deny_output.as_ref();
        if let Some(at) = denied.and_then(|filter| filter.find(choice.text())) {
            choice.cut(at);
            self.ticket.cancel(index);
            self.record.note(|details| details.blocked = Some("filter_output"));
        }
        Ok(true)
    }
}
