//! Which text of a rendered conversation is the assistant's: what a model is trained to write.
//!
//! A reply begins where the template's generation prompt for it ends, as it does when a model is asked for it, and ends
//! with what the template writes after it, such as an end-of-turn token. Both places are found by rendering the
//! conversation up to the reply, and with it, which must be how the whole conversation begins: templates that write
//! earlier turns otherwise once there are later ones, such as those that drop earlier thoughts, are refused. Where a
//! template has `{% generation %}` blocks, what they print are the replies instead.

use super::{ChatTemplate, Message, chat_template::MARKS};
use crate::{Error, Result};

/// The role whose turns are replies.
const ASSISTANT: &str = "assistant";

/// A part of a rendered conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The text.
    pub text: String,
    /// Whether the assistant writes it.
    pub is_reply: bool,
}

impl ChatTemplate {
    /// A conversation up to its last reply, cut at the beginnings and ends of its replies. The texts joined are
    /// [`render`](Self::render)ed `messages` without a generation prompt.
    ///
    /// ```
    /// use bitnet_model::text::{ChatTemplate, Message};
    ///
    /// let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}\
    ///     {% if add_generation_prompt %}assistant: {% endif %}";
    /// let template = ChatTemplate::new(source, &Default::default())?;
    /// let messages = [Message::new("user", "hi"), Message::new("assistant", "ho")];
    /// let spans = template.spans(&messages)?;
    /// let found: Vec<_> = spans.iter().map(|span| (span.text.as_str(), span.is_reply)).collect();
    /// assert_eq!(found, [("user: hi; assistant: ", false), ("ho; ", true)]);
    /// # Ok::<(), bitnet_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`render`](Self::render); a conversation without a reply; a template with which the conversation up to a
    /// reply is not how the whole one begins.
    pub fn spans(&self, messages: &[Message]) -> Result<Vec<Span>> {
        let replies: Vec<usize> =
            (0..messages.len()).filter(|&index| messages[index].role == ASSISTANT).collect();
        let Some(&last) = replies.last() else {
            return Err(Error::Tokenizer(format!("no message is of the role `{ASSISTANT}`")));
        };
        if self.is_marked() {
            return marked(&self.render_marked(&messages[..=last], false)?);
        }
        let whole = self.render(&messages[..=last], false)?;
        let mut spans = Vec::new();
        let mut push = |text: &str, is_reply| {
            if !text.is_empty() {
                spans.push(Span { text: text.to_owned(), is_reply });
            }
        };
        let mut at = 0;
        for &index in &replies {
            let before = self.render(&messages[..index], true)?;
            let after = match index == last {
                true => whole.clone(),
                false => self.render(&messages[..=index], false)?,
            };
            let is_prefix = whole.starts_with(&after) && after.starts_with(&before);
            if !is_prefix || before.len() < at {
                return Err(Error::Tokenizer(format!(
                    "chat template: message {} is not found in the whole conversation: rendered up to there, with the \
                     generation prompt, the conversation begins otherwise; use a template that writes every turn the \
                     same way wherever it stands, or put `{{% generation %}}` blocks around what the assistant writes",
                    index + 1
                )));
            }
            push(&whole[at..before.len()], false);
            push(&whole[before.len()..after.len()], true);
            at = after.len();
        }
        if !spans.iter().any(|span| span.is_reply) {
            return Err(Error::Tokenizer("chat template: leaves the assistant's turns out".into()));
        }
        Ok(spans)
    }
}

/// The parts of a text with [`MARKS`] around the replies, up to the last one.
fn marked(text: &str) -> Result<Vec<Span>> {
    let [begin, end] = MARKS;
    let mut spans = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(begin) {
        let (reply, after) = after.split_once(end).unwrap_or((after, ""));
        for (text, is_reply) in [(before, false), (reply, true)] {
            if !text.is_empty() {
                spans.push(Span { text: text.to_owned(), is_reply });
            }
        }
        rest = after;
    }
    match spans.iter().any(|span| span.is_reply) {
        true => Ok(spans),
        false => Err(Error::Tokenizer(
            "chat template: its `{% generation %}` blocks print nothing for this conversation"
                .into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(source: &str, roles: &[(&str, &str)]) -> Result<Vec<(String, bool)>> {
        let template = ChatTemplate::new(source, &Default::default())?;
        let messages: Vec<Message> =
            roles.iter().map(|(role, text)| Message::new(*role, *text)).collect();
        let spans = template.spans(&messages)?;
        Ok(spans.into_iter().map(|span| (span.text, span.is_reply)).collect())
    }

    const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";

    #[test]
    fn replies_begin_after_the_generation_prompt() {
        let messages = [
            ("system", "s"),
            ("user", "a"),
            ("assistant", " é "),
            ("user", "b"),
            ("assistant", "c"),
            ("assistant", "d"),
            ("user", "never answered"),
        ];
        let expected = [
            ("<system>s</>\n<user>a</>\n<assistant>", false),
            ("é</>\n", true),
            ("<user>b</>\n<assistant>", false),
            ("c</>\n", true),
            ("<assistant>", false),
            ("d</>\n", true),
        ];
        let found = spans(PLAIN, &messages).unwrap();
        assert_eq!(found, expected.map(|(text, is_reply)| (text.to_owned(), is_reply)));
        let first = spans(PLAIN, &messages[2..3]).unwrap();
        assert_eq!(first, [("<assistant>".to_owned(), false), ("é</>\n".to_owned(), true)]);
    }

    #[test]
    fn generation_blocks_say_what_a_reply_is() {
        // Earlier replies are written otherwise, which without blocks would be refused.
        let source = "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A' if loop.last else 'a' }}:\
            {%- generation %}{% set said = m.content | upper %}{{ said }}.{% endgeneration %};\
            {% else %}{{ m.content }};{% endif %}{% endfor %}";
        let talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        let expected = [("a;a:", false), ("B.", true), (";c;A:", false), ("D.", true)];
        let found = spans(source, &talk).unwrap();
        assert_eq!(found, expected.map(|(text, is_reply)| (text.to_owned(), is_reply)));
        let template = ChatTemplate::new(source, &Default::default()).unwrap();
        let messages = talk.map(|(role, text)| Message::new(role, text));
        assert_eq!(template.render(&messages, false).unwrap(), "a;a:B.;c;A:D.;");
        let silent = "{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}";
        assert!(spans(silent, &talk).unwrap_err().to_string().contains("print nothing"));
    }

    #[test]
    fn what_cannot_be_told_apart_is_refused() {
        let message = |source: &str, messages: &[(&str, &str)]| {
            spans(source, messages).unwrap_err().to_string()
        };
        let talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        assert!(message(PLAIN, &talk[..1]).contains("no message is of the role `assistant`"));
        // Earlier replies are left out.
        let forgetful = "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }};{% endif %}{% endfor %}";
        assert!(message(forgetful, &talk).contains("message 2 is not found"));
        // The generation prompt is not how a reply begins.
        let other = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}";
        assert!(message(other, &talk[..2]).contains("message 2 is not found"));
        let mute = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
        assert!(message(mute, &talk).contains("leaves the assistant's turns out"));
        let strict = "{{ raise_exception('no!') }}";
        assert!(message(strict, &talk).contains("no!"));
    }
}
