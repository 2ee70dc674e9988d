//! Examples before a question, and the prompt that comes of both.

use bitnet_model::text::{ChatTemplate, Message};

use super::{Document, python_random::PythonRandom};
use crate::{Error, Result};

/// What stands between a text and its answer, and between a text and a choice.
pub const TARGET_DELIMITER: &str = " ";
/// What stands behind an example.
const EXAMPLE_DELIMITER: &str = "\n\n";

/// Draws the examples of one document after the other, as the harness does with its sampler.
pub struct Drawer<'a> {
    pool: &'a [Document],
    rng: PythonRandom,
    /// Whether a document is no example of itself.
    leaves_out: bool,
}

impl<'a> Drawer<'a> {
    /// Draws from `pool`. `leaves_out` is what the harness does with tasks that have no test split: it draws one more, and
    /// leaves out the document that is asked.
    pub fn new(pool: &'a [Document], seed: u64, leaves_out: bool) -> Self {
        Self { pool, rng: PythonRandom::new(seed), leaves_out }
    }

    /// The examples of the next document.
    ///
    /// # Errors
    /// There are not enough.
    pub fn draw(&mut self, count: usize, document: &Document) -> Result<Vec<&'a Document>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let draws = count + usize::from(self.leaves_out);
        let too_few = |there: usize| {
            Error::Input(format!("{draws} examples are drawn for a prompt, but there are {there}"))
        };
        if draws > self.pool.len() {
            return Err(too_few(self.pool.len()));
        }
        let drawn = self.rng.sample(self.pool.len(), draws);
        let drawn = Vec::from_iter(drawn.into_iter().map(|index| &self.pool[index]));
        if !self.leaves_out {
            return Ok(drawn);
        }
        let mut others = Vec::from_iter(drawn.into_iter().filter(|&other| other != document));
        others.truncate(count);
        if others.len() < count {
            let pool = Vec::from_iter(self.pool.iter().filter(|&other| other != document));
            if count > pool.len() {
                return Err(too_few(pool.len()));
            }
            let drawn = self.rng.sample(pool.len(), count);
            others = drawn.into_iter().map(|index| pool[index]).collect();
        }
        Ok(others)
    }
}

/// The prompt that ends in `text`: with a chat template the examples are turns of a conversation.
///
/// # Errors
/// The template refuses.
pub fn prompt(
    examples: &[&Document],
    text: &str,
    template: Option<&ChatTemplate>,
) -> Result<String> {
    if let Some(template) = template {
        let turns = examples.iter().flat_map(|example| {
            let assistant = Message::new("assistant", &example.answer);
            [Message::new("user", &example.text), assistant]
        });
        let messages = Vec::from_iter(turns.chain([Message::new("user", text)]));
        return Ok(template.render(&messages, true)?);
    }
    let mut prompt = String::new();
    for Document { text, answer, .. } in examples {
        prompt.extend([text, TARGET_DELIMITER, answer, EXAMPLE_DELIMITER]);
    }
    Ok(prompt + text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Ask;

    fn documents(count: usize) -> Vec<Document> {
        let document =
            |i| Document { text: format!("q{i}"), answer: format!("a{i}"), ask: Ask::Ending };
        (0..count).map(document).collect()
    }

    #[test]
    fn a_document_is_no_example_of_itself() {
        let pool = documents(3);
        let mut drawer = Drawer::new(&pool, 1, true);
        for document in pool.iter().cycle().take(12) {
            let drawn = drawer.draw(2, document).unwrap();
            assert!(drawn.len() == 2 && !drawn.contains(&document));
        }
        assert!(drawer.draw(3, &pool[0]).unwrap_err().to_string().contains("there are 3"));
        // Every copy of it is left out, and what is missing is drawn again.
        let twice = [documents(3), documents(1)].concat();
        let mut drawer = Drawer::new(&twice, 5, true);
        for _ in 0..20 {
            assert!(!drawer.draw(2, &twice[0]).unwrap().contains(&&twice[0]));
        }
    }

    #[test]
    fn examples_stand_before_the_question() {
        let pool = documents(2);
        assert_eq!(prompt(&[&pool[1], &pool[0]], "q", None).unwrap(), "q1 a1\n\nq0 a0\n\nq");
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                      {% if add_generation_prompt %}<assistant>{% endif %}";
        let template = ChatTemplate::new(source, &Default::default()).unwrap();
        let chat = prompt(&[&pool[1]], "q", Some(&template)).unwrap();
        assert_eq!(chat, "<user>q1<assistant>a1<user>q<assistant>");
    }
}
