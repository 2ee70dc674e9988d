//! Cleaning of what clients send, if that is asked for: characters that people don't see, and spellings of special tokens, by
//! which a text could pass for a part of the template around it.

use bitnet_model::text::Tokenizer;
use serde_json::Value;
use unicode_normalization::UnicodeNormalization;

/// The fields of requests that carry texts of people.
const FIELDS: [&str; 5] = ["messages", "prompt", "input", "instructions", "suffix"];

/// Takes out of texts what does not belong there.
pub struct Sanitizer {
    /// Spellings, longest first.
    special: Vec<String>,
}

impl Sanitizer {
    /// For a model's tokens.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let ids = (0..tokenizer.vocab_size() as u32).filter(|id| tokenizer.is_special(*id));
        let mut special = Vec::from_iter(ids.filter_map(|id| tokenizer.id_to_token(id)));
        special.retain(|token| !token.is_empty());
        special.sort_by_key(|token| std::cmp::Reverse(token.len()));
        Self { special }
    }

    /// Cleans the texts of a request's body.
    pub fn clean(&self, body: &mut Value) {
        let Some(fields) = body.as_object_mut() else { return };
        for name in FIELDS {
            if let Some(value) = fields.get_mut(name) {
                self.clean_all(value);
            }
        }
    }

    fn clean_all(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.clean_text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.clean_all(value)),
            // Of messages and their parts, the names of roles and types are no texts of people.
            Value::Object(fields) => {
                let texts =
                    fields.iter_mut().filter(|(name, _)| ["content", "text"].contains(&&name[..]));
                texts.for_each(|(_, value)| self.clean_all(value));
            }
            _ => {}
        }
    }

    /// Composed characters (NFC), without those that are not seen, without spellings of special tokens. Each is taken out where
    /// it ends, so that parts which that brings together are seen as well, in one pass.
    pub fn clean_text(&self, text: &str) -> String {
        let mut clean = String::with_capacity(text.len());
        for c in text.nfc().filter(|c| !is_unseen(*c)) {
            clean.push(c);
            if let Some(token) = self.special.iter().find(|token| clean.ends_with(&token[..])) {
                clean.truncate(clean.len() - token.len());
            }
        }
        clean
    }
}

/// Control characters but for line ends and tabs, and characters without a width or that turn the direction of writing.
fn is_unseen(c: char) -> bool {
    let is_control = c.is_control() && !['\n', '\t', '\r'].contains(&c);
    is_control
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use bitnet_model::pretrained::Source;
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_are_cleaned_and_nothing_else() {
        let hub = bitnet_model::hub::Hub::from_env();
        let source = Source::open("default", Default::default(), &hub).unwrap();
        let sanitizer = Sanitizer::new(&source.tokenizer().unwrap().unwrap());
        let token = sanitizer.special.first().unwrap().clone();
        let (head, tail) = token.split_at(1);
        let text = format!("a\u{200b}b{token}\u{7}e\u{301}{head}{token}{tail}\n");
        assert_eq!(sanitizer.clean_text(&text), "abé\n");
        let nested = head.repeat(100_000) + &tail.repeat(100_000);
        assert_eq!(sanitizer.clean_text(&nested), "", "one in the other");
        let mut body = json!({"model": "m\u{200b}", "messages": [{"role": "user\u{200b}", "content": [{"type": "text", "text": text}]}], "prompt": [[1], text]});
        sanitizer.clean(&mut body);
        let expected = json!({"model": "m\u{200b}", "messages": [{"role": "user\u{200b}", "content": [{"type": "text", "text": "abé\n"}]}], "prompt": [[1], "abé\n"]});
        assert_eq!(body, expected);
    }
}
