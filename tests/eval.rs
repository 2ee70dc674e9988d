//! Answers judged as lm-evaluation-harness judges them.

#![allow(clippy::unwrap_used)]

use bitnet_train::eval::{Ask, Document, Response, Task};
use flate2::read::GzDecoder;
use serde_json::Value;

/// `judged.jsonl.gz` is what lm-evaluation-harness 0.4.13 says of answers, as `scripts/peers_eval.py --freeze` writes it: task, answer,
/// target, and the last of the values. Of `minerva_math500` that is `is_equiv`: equal texts, or formulas that sympy finds equal.
#[test]
fn answers_are_judged_as_by_the_harness() {
    let judged = GzDecoder::new(&include_bytes!("fixtures/eval/judged.jsonl.gz")[..]);
    let judged = std::io::read_to_string(judged).unwrap();
    let (mut right, mut wrong) = (0, 0);
    for line in judged.lines() {
        let line: Vec<Value> = serde_json::from_str(line).unwrap();
        let [task, answer, target] = [0, 1, 2].map(|index| line[index].as_str().unwrap());
        let document = Document {
            text: String::new(),
            answer: String::new(),
            ask: Ask::Written { target: target.into() },
        };
        let task = Task::by_name(task).unwrap();
        let found = task.values(&document, &[Response::Text(answer.into())]).unwrap();
        let found = Vec::from_iter(found.iter().map(|sample| sample.value));
        let expected = Vec::from_iter(line[3..].iter().map(|value| value.as_f64().unwrap()));
        assert!(found.ends_with(&expected), "{}: {answer:?} for {target:?}: {found:?}", task.name);
        let is_right = expected.contains(&1.);
        (right, wrong) = (right + usize::from(is_right), wrong + usize::from(!is_right));
    }
    assert!(right > 50 && wrong > 50, "{right} {wrong}");
}
