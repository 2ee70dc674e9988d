//! The messages so far and the session that answers them.

use std::{fs, io::Write, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use bitnet_model::{
    adapter::Adaptation,
    config::Config,
    model::Model,
    session::Session,
    text::{Message, Tokenizer},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{
    adapter::{self, AdapterSpec},
    continuation::{self, Finish, TextOutput, check_prompt},
    sampling::Plan,
    statistics::{Bytes, Statistics},
};

/// A conversation with a model. One session holds it, so only what is new is run.
pub struct Conversation {
    config: Config,
    /// The model without adapters.
    base: Arc<Model>,
    /// Beside it in the session.
    adapters: Vec<AdapterSpec>,
    open: OpenSession,
    session: Session,
    tokenizer: Tokenizer,
    plan: Plan,
    rng: ChaCha8Rng,
    system: Option<String>,
    /// Of user and assistant.
    messages: Vec<Message>,
    load_time: Duration,
    /// Of the last reply.
    statistics: Option<Statistics>,
}

/// Makes an empty session of a model.
pub type OpenSession = Box<dyn Fn(&Arc<Model>) -> Session>;

impl Conversation {
    /// An empty conversation; `tokenizer` has a chat template.
    pub fn new(
        (base, open): (Arc<Model>, OpenSession),
        tokenizer: Tokenizer,
        plan: Plan,
        system: Option<String>,
        load_time: Duration,
    ) -> Self {
        Self {
            config: base.config().clone(),
            session: open(&base),
            base,
            adapters: Vec::new(),
            open,
            tokenizer,
            rng: ChaCha8Rng::seed_from_u64(plan.seed),
            plan,
            system,
            messages: Vec::new(),
            load_time,
            statistics: None,
        }
    }

    /// Answers `message`, writing the reply to `out` as it comes and a line break behind it. A reply
    /// that was stopped is kept as far as it went; a message without any reply is forgotten.
    ///
    /// # Errors
    /// A template that refuses the conversation; a conversation longer than the context; those of
    /// `out`. The message is forgotten.
    pub fn reply(&mut self, message: String, out: &mut dyn Write) -> anyhow::Result<Finish> {
        self.messages.push(Message::new("user", message));
        let replied = self.answer(out);
        match &replied {
            Ok((reply, finish)) if !reply.is_empty() || *finish != Finish::Interrupted => {
                self.messages.push(Message::new("assistant", reply));
            }
            _ => {
                self.messages.pop();
            }
        }
        Ok(replied?.1)
    }

    fn answer(&mut self, out: &mut dyn Write) -> anyhow::Result<(String, Finish)> {
        let prompt = self.prompt(&self.all_messages())?;
        check_prompt(&prompt, &self.config).context("/reset starts a new conversation")?;
        let mut text = TextOutput::new(&self.tokenizer, self.plan.stop.clone(), Some(&mut *out));
        let continuation = continuation::run(
            &mut self.session,
            &prompt,
            (&self.plan.options, &mut self.rng),
            self.load_time,
            &mut |id| text.push(id),
        )?;
        let (reply, finish) = text.finish(continuation.finish)?;
        if !reply.ends_with('\n') {
            writeln!(out)?;
        }
        out.flush()?;
        self.statistics = Some(continuation.statistics);
        Ok((reply, finish))
    }

    /// The tokens that ask for a reply to `messages`. As the model card of BitNet b1.58 2B4T has it,
    /// the template is rendered to text and the text encoded with special tokens.
    fn prompt(&self, messages: &[Message]) -> anyhow::Result<Vec<u32>> {
        let Some(template) = self.tokenizer.chat_template()? else {
            bail!("the tokenizer has no chat template")
        };
        let text = template.render(messages, true)?;
        Ok(self.tokenizer.encode_prompt(&text)?)
    }

    fn all_messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Puts a system message in front.
    pub fn set_system(&mut self, text: String) {
        self.system = Some(text);
    }

    /// The adapters beside the model.
    pub fn adapters(&self) -> &[AdapterSpec] {
        &self.adapters
    }

    /// Reads `adapters` and puts them beside the model, and no others; on an error everything stays as it was.
    pub fn adapt(&mut self, adapters: Vec<AdapterSpec>, progress: bool) -> anyhow::Result<()> {
        let tokenizer = || Ok(Some(self.tokenizer.clone()));
        let adaptation = adapter::read(&adapters, &self.config, tokenizer, progress)?;
        self.put_beside(adapters, adaptation.as_ref())
    }

    /// Puts `adaptation`, which is what `adapters` come to, beside the model. The messages stay, and are run again with the
    /// next one.
    pub fn put_beside(
        &mut self,
        adapters: Vec<AdapterSpec>,
        adaptation: Option<&Adaptation>,
    ) -> anyhow::Result<()> {
        let model = adapter::beside(self.base.clone(), adaptation)?;
        self.session = (self.open)(&model);
        self.adapters = adapters;
        Ok(())
    }

    /// Forgets everything but the system message.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.session.truncate(0);
    }

    /// Writes the messages to `path` as a JSON list of `{role, content}`, whole or not at all.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let write = || -> anyhow::Result<()> {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
            serde_json::to_writer_pretty(&mut file, &self.all_messages())?;
            file.write_all(b"\n")?;
            file.persist(path).map_err(|error| error.error)?;
            Ok(())
        };
        write().with_context(|| format!("/save {}", path.display()))
    }

    /// Takes over the messages of a file that [`save`](Self::save) wrote; on an error everything
    /// stays as it was.
    pub fn load(&mut self, path: &Path) -> anyhow::Result<()> {
        let read = || -> anyhow::Result<Vec<Message>> {
            let messages = parse(&fs::read_to_string(path)?)?;
            self.prompt(&messages)?; // does the template accept them?
            Ok(messages)
        };
        let mut messages = read().with_context(|| format!("/load {}", path.display()))?;
        let has_system = messages.first().is_some_and(|message| message.role == "system");
        self.system = has_system.then(|| messages.remove(0).content);
        self.messages = messages;
        self.session.truncate(0);
        Ok(())
    }

    /// How full the context is, and the last reply's statistics.
    pub fn describe(&self) -> String {
        let context = format!(
            "{} messages, {} of {} tokens of context, cache {}, seed {}",
            self.messages.len(),
            self.session.tokens().len(),
            self.config.max_position_embeddings,
            Bytes(self.session.cache_bytes() as u64),
            self.plan.seed,
        );
        match &self.statistics {
            Some(statistics) => format!("{context}\nlast reply: {statistics}"),
            None => context,
        }
    }
}

/// The messages of a JSON list, a system message only in front.
fn parse(json: &str) -> anyhow::Result<Vec<Message>> {
    let messages: Vec<Message> =
        serde_json::from_str(json).context("expected a JSON list of {role, content}")?;
    for (index, message) in messages.iter().enumerate() {
        match (message.role.as_str(), index) {
            ("user" | "assistant", _) | ("system", 0) => {}
            ("system", _) => bail!("message {index}: a system message stands in front or nowhere"),
            (role, _) => bail!("message {index}: role `{role}` is not system, user or assistant"),
        }
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_messages_are_checked() {
        let error = |json: &str| format!("{:#}", parse(json).unwrap_err());
        assert!(error("{}").starts_with("expected a JSON list of {role, content}: "));
        assert!(error(r#"[{"role": "user"}]"#).contains("missing field `content`"));
        assert_eq!(
            error(r#"[{"role": "tool", "content": ""}]"#),
            "message 0: role `tool` is not system, user or assistant"
        );
        assert_eq!(
            error(r#"[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]"#),
            "message 1: a system message stands in front or nowhere"
        );
        assert_eq!(parse("[]").unwrap(), []);
    }
}
