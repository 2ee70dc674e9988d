//! Samples → text, of which some is the answer.
//!
//! With a chat template every form is a conversation: the instruction (and, after a blank line, its input) or the prompt
//! is what the user says, the output or completion what the assistant replies. Without one, an instruction is put into
//! Alpaca's prompt, and a prompt stands before its completion as it is. A model that was trained so is asked so:
//!
//! ```text
//! Below is an instruction that describes a task. Write a response that appropriately completes the request.
//!
//! ### Instruction:
//! INSTRUCTION
//!
//! ### Response:
//! ```

use bitnet_model::text::{ChatTemplate, Message, Span};

use super::record::Sample;

/// Begins Alpaca's prompt for an instruction that needs nothing more.
const ALPACA: &str = "Below is an instruction that describes a task. Write a response that appropriately completes the \
    request.";
/// Begins Alpaca's prompt for an instruction with an input.
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an input that provides further \
    context. Write a response that appropriately completes the request.";

/// The text of `sample`, in parts of which the replies are to be learned.
pub(super) fn spans(sample: Sample, template: Option<&ChatTemplate>) -> Result<Vec<Span>, String> {
    match (template, sample) {
        (_, Sample::Text(text)) => Ok(vec![Span { text, is_reply: true }]),
        (Some(template), sample) => {
            template.spans(&conversation(sample)).map_err(|error| error.to_string())
        }
        (None, Sample::Conversation(_)) => Err(
            "a conversation needs a chat template, and the model has none; name one in `data.chat_template`".into(),
        ),
        (None, Sample::Instruction { system, instruction, input, output }) => {
            Ok(pair(alpaca(&system, &instruction, &input), output))
        }
        (None, Sample::Completion { prompt, completion }) => Ok(pair(prompt, completion)),
    }
}

fn pair(prompt: String, reply: String) -> Vec<Span> {
    vec![Span { text: prompt, is_reply: false }, Span { text: reply, is_reply: true }]
}

fn conversation(sample: Sample) -> Vec<Message> {
    let ask = |system: String, prompt: String, reply: String| {
        let system = (!system.trim().is_empty()).then(|| Message::new("system", system));
        let turns = [Message::new("user", prompt), Message::new("assistant", reply)];
        system.into_iter().chain(turns).collect()
    };
    match sample {
        Sample::Conversation(messages) => messages,
        Sample::Instruction { system, instruction, input, output } => {
            let prompt = match input.trim().is_empty() {
                true => instruction,
                false => format!("{instruction}\n\n{input}"),
            };
            ask(system, prompt, output)
        }
        Sample::Completion { prompt, completion } => ask(String::new(), prompt, completion),
        Sample::Text(text) => vec![Message::new("assistant", text)],
    }
}

/// The prompt of the Alpaca models; a system message takes the place of its first paragraph.
fn alpaca(system: &str, instruction: &str, input: &str) -> String {
    let has_input = !input.trim().is_empty();
    let preamble = match (system.trim().is_empty(), has_input) {
        (false, _) => system,
        (true, true) => ALPACA_WITH_INPUT,
        (true, false) => ALPACA,
    };
    let input = if has_input { format!("### Input:\n{input}\n\n") } else { String::new() };
    format!("{preamble}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(system: &str, input: &str) -> Sample {
        Sample::Instruction {
            system: system.into(),
            instruction: "Add.".into(),
            input: input.into(),
            output: "3".into(),
        }
    }

    fn texts(spans: Vec<Span>) -> Vec<(String, bool)> {
        spans.into_iter().map(|span| (span.text, span.is_reply)).collect()
    }

    #[test]
    fn without_a_template_the_prompt_is_alpacas() {
        let prompt = |sample| {
            let spans = texts(spans(sample, None).unwrap());
            assert_eq!(spans[1..], [("3".to_owned(), true)]);
            spans[0].0.clone()
        };
        let plain = prompt(instruction("", " "));
        assert!(plain.starts_with(ALPACA));
        assert!(plain.ends_with("the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"));
        let with_input = prompt(instruction("", "1 and 2"));
        assert!(with_input.starts_with(ALPACA_WITH_INPUT));
        assert!(with_input.ends_with("Add.\n\n### Input:\n1 and 2\n\n### Response:\n"));
        assert!(prompt(instruction("Be.", "")).starts_with("Be.\n\n### Instruction:\n"));
        let completion = Sample::Completion { prompt: "1 + 2 = ".into(), completion: "3".into() };
        assert_eq!(prompt(completion), "1 + 2 = ");
        let talk = Sample::Conversation(vec![Message::new("assistant", "hi")]);
        assert!(spans(talk, None).unwrap_err().contains("`data.chat_template`"));
    }

    #[test]
    fn with_a_template_everything_but_a_text_is_a_conversation() {
        let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}\
            {% if add_generation_prompt %}assistant: {% endif %}";
        let template = ChatTemplate::new(source, &Default::default()).unwrap();
        let found = texts(spans(instruction("Be.", "1 and 2"), Some(&template)).unwrap());
        let prompt = "system: Be.|user: Add.\n\n1 and 2|assistant: ";
        assert_eq!(found, [(prompt.to_owned(), false), ("3|".to_owned(), true)]);
        let text = texts(spans(Sample::Text("once".into()), Some(&template)).unwrap());
        assert_eq!(text, [("once".to_owned(), true)]);
    }
}
