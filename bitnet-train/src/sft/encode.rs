//! Text of which some is the answer → tokens of which some are trained.
//!
//! The parts are encoded one by one: up to a reply the tokens are those of the prompt that a model is asked with, whatever
//! the reply begins with, and no token is of both. What a chat template ends a turn with is trained; where it ends the
//! last one without a special token, and after a plain text, an end-of-text token is added.

use bitnet_model::text::{Span, Tokenizer};

use super::Example;

/// What the loss is taken of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// `assistant`: replies, outputs and completions, with their ends.
    #[default]
    Assistant,
    /// `all`: everything but the first token.
    All,
}

/// How samples become tokens.
#[derive(Clone, Debug)]
pub(super) struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    /// Added at an end without a special token.
    pub eos: u32,
    pub loss_on: LossOn,
    /// An example has at most one token more, which is only predicted.
    pub max_length: usize,
}

/// What has become of a sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Encoded {
    /// `None` if no token that is trained is left.
    pub example: Option<Example>,
    /// Tokens of the whole sample.
    pub length: usize,
    /// How many of them were cut off.
    pub cut: usize,
}

impl Encoder<'_> {
    /// The tokens of `spans`, from the first on as many as there may be.
    pub fn encode(&self, spans: &[Span]) -> bitnet_model::Result<Encoded> {
        let (mut ids, mut trained) = (Vec::new(), Vec::new());
        for (index, Span { text, is_reply }) in spans.iter().enumerate() {
            let first = ids.len();
            match index {
                0 => ids.extend(self.tokenizer.encode_prompt(text)?),
                _ => ids.extend(self.tokenizer.encode(text, false)?),
            }
            let end = if *is_reply { self.end(&ids, first)? } else { first };
            trained.extend((first..ids.len()).map(|at| at < end));
            let is_last = index + 1 == spans.len();
            let is_ended = ids[..end].last().is_some_and(|&id| self.tokenizer.is_special(id));
            if is_last && *is_reply && !is_ended {
                ids.push(self.eos);
                trained.push(true);
            }
        }
        if self.loss_on == LossOn::All {
            trained.fill(true);
        }
        let length = ids.len();
        ids.truncate(self.max_length + 1);
        let cut = length - ids.len();
        trained.truncate(ids.len());
        // Nothing is learned from what comes after the last token that is trained.
        let used = trained.iter().rposition(|&is_trained| is_trained).map_or(0, |last| last + 1);
        ids.truncate(used);
        trained.truncate(used);
        if used < 2 {
            return Ok(Encoded { example: None, length, cut });
        }
        trained[0] = false;
        let answer: Vec<u32> = ids
            .iter()
            .zip(&trained)
            .filter(|(_, is_trained)| **is_trained)
            .map(|(&id, _)| id)
            .collect();
        let bytes = self.tokenizer.decode(&answer, true)?.len();
        Ok(Encoded { example: Some(Example { ids, trained, bytes }), length, cut })
    }

    /// Where the reply that begins at `first` ends: white space after its last special token, such as the line end after
    /// `<|im_end|>`, is between the turns.
    fn end(&self, ids: &[u32], first: usize) -> bitnet_model::Result<usize> {
        let special = ids[first..].iter().rposition(|&id| self.tokenizer.is_special(id));
        let Some(special) = special else { return Ok(ids.len()) };
        let after = first + special + 1;
        let is_blank = self.tokenizer.decode(&ids[after..], false)?.trim().is_empty();
        Ok(if is_blank { after } else { ids.len() })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use bitnet_model::{
        pretrained::default_files,
        text::{ChatTemplate, Message},
    };
    use proptest::prelude::*;

    use super::*;

    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
        let file = |name: &str| default_files().into_iter().find(|file| file.0 == name).unwrap().1;
        let config = file("tokenizer_config.json");
        Tokenizer::from_bytes(file("tokenizer.json"), Some(config), None).unwrap()
    });

    /// As those of 2B-4T, Llama 3, ChatML (with a line end between the turns), and one that ends no turn; with the spelling
    /// of the end of a turn. The special tokens are those of the tokenizer.
    const TEMPLATES: [(&str, &str); 4] = [
        (
            "{% for m in messages %}{{ m.role | capitalize ~ ': ' ~ m.content ~ '<|eot_id|>' }}{% endfor %}\
             {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
            "<|eot_id|>",
        ),
        (
            "{{ bos_token }}{% for m in messages %}{{ '<h>' ~ m.role ~ '</h>\n\n' ~ m.content ~ '<|eot_id|>' }}{% endfor %}\
             {% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}",
            "<|eot_id|>",
        ),
        (
            "{% for m in messages %}{{ '[' ~ m.role ~ '\n' ~ m.content ~ eos_token ~ '\n' }}{% endfor %}\
             {% if add_generation_prompt %}{{ '[assistant\n' }}{% endif %}",
            "<|end_of_text|>",
        ),
        (
            "{% for m in messages %}{{ '\n' ~ m.role ~ ': ' ~ m.content }}{% endfor %}\
             {% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}",
            "",
        ),
    ];

    fn encoder(max_length: usize, loss_on: LossOn) -> Encoder<'static> {
        Encoder { tokenizer: &TOKENIZER, eos: 1, loss_on, max_length }
    }

    fn trained(example: &Example) -> String {
        let ids = example.ids.iter().zip(&example.trained).filter(|(_, trained)| **trained);
        TOKENIZER.decode(&ids.map(|(&id, _)| id).collect::<Vec<_>>(), false).unwrap()
    }

    fn turns() -> impl Strategy<Value = Vec<Message>> {
        // What is written as a special token is one, here as in a prompt.
        let text = any::<String>().prop_filter("special tokens", |text| !text.contains("<|"));
        let turn = (text.clone(), text.prop_filter("no answer", |text| !text.is_empty()));
        (any::<bool>(), prop::collection::vec(turn, 1..4)).prop_map(|(has_system, turns)| {
            let system = has_system.then(|| Message::new("system", "Be brief. é"));
            let pair = |(ask, reply): (String, String)| {
                [Message::new("user", ask), Message::new("assistant", reply)]
            };
            system.into_iter().chain(turns.into_iter().flat_map(pair)).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_is_trained_is_what_the_assistant_says(messages in turns(), index in 0..TEMPLATES.len()) {
            let (source, end) = TEMPLATES[index];
            let tokens = [("bos_token", "<|begin_of_text|>"), ("eos_token", "<|end_of_text|>")];
            let tokens = tokens.map(|(name, token)| (name.to_owned(), token.to_owned()));
            let template = ChatTemplate::new(source, &tokens.into()).unwrap();
            let spans = template.spans(&messages).unwrap();
            let whole: String = spans.iter().map(|span| span.text.as_str()).collect();
            prop_assert_eq!(&whole, &template.render(&messages, false).unwrap());
            let Encoded { example, cut, .. } = encoder(1 << 20, LossOn::Assistant).encode(&spans).unwrap();
            let example = example.unwrap();
            let replies = messages.iter().filter(|message| message.role == "assistant");
            let mut expected: String = replies.map(|message| message.content.clone() + end).collect();
            let bytes = expected.len() - end.len() * expected.matches(end).count().min(
                if end.is_empty() { 0 } else { usize::MAX });
            if end.is_empty() {
                expected += "<|end_of_text|>";
            }
            prop_assert_eq!(trained(&example), expected);
            prop_assert_eq!((example.bytes, cut, example.ids[0]), (bytes, 0, 0));
            // Up to the first reply, the tokens are those that `bitnet chat` asks with.
            let first = messages.iter().position(|message| message.role == "assistant").unwrap();
            let prompt = TOKENIZER.encode_prompt(&template.render(&messages[..first], true).unwrap()).unwrap();
            prop_assert_eq!(&example.ids[..prompt.len()], &prompt[..]);
            prop_assert!(example.trained[..prompt.len()].iter().all(|trained| !trained));
        }
    }

    fn span(text: &str, is_reply: bool) -> Span {
        Span { text: text.into(), is_reply }
    }

    #[test]
    fn what_is_too_long_is_cut_and_counted() {
        let spans = [span("Who is there? ", false), span("A little hen and a big cat.", true)];
        let whole = encoder(100, LossOn::Assistant).encode(&spans).unwrap().example.unwrap();
        assert_eq!(trained(&whole), "A little hen and a big cat.<|end_of_text|>");
        assert_eq!((whole.bytes, whole.trained[0]), (27, false));
        let prompt = whole.trained.iter().position(|trained| *trained).unwrap();
        let Encoded { example, cut, .. } =
            encoder(prompt + 1, LossOn::Assistant).encode(&spans).unwrap();
        let example = example.unwrap();
        assert_eq!((example.ids.len(), cut), (prompt + 2, whole.ids.len() - prompt - 2));
        assert_eq!(example.ids[..], whole.ids[..prompt + 2]);
        assert_eq!(encoder(prompt - 1, LossOn::Assistant).encode(&spans).unwrap().example, None);
        let all = encoder(prompt - 1, LossOn::All).encode(&spans).unwrap().example.unwrap();
        assert_eq!(
            (all.ids.len(), all.trained.iter().filter(|trained| **trained).count()),
            (prompt, prompt - 1)
        );
    }

    #[test]
    fn a_text_stands_between_the_ends() {
        let example = encoder(100, LossOn::Assistant).encode(&[span("Once é", true)]).unwrap();
        let example = example.example.unwrap();
        assert_eq!((example.ids[0], example.ids.last()), (0, Some(&1)));
        assert_eq!((trained(&example).as_str(), example.bytes), ("Once é<|end_of_text|>", 7));
    }
}
