//! Answers to requests that get the same answer again: greedy ones, and those with a seed.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Of a request.
pub type Fingerprint = [u8; 32];

/// Answers, in bounded memory.
pub struct Cache {
    bytes: usize,
    answers: Mutex<Answers>,
}

#[derive(Default)]
struct Answers {
    all: HashMap<Fingerprint, Kept>,
    bytes: usize,
    /// Counts uses.
    now: u64,
}

struct Kept {
    answer: Value,
    bytes: usize,
    used: u64,
}

impl Cache {
    /// Empty, for so many bytes of answers.
    pub fn new(bytes: usize) -> Self {
        Self { bytes, answers: Mutex::default() }
    }

    /// Of a request's route and body, and of the adapters there are: `version` changes with them.
    pub fn fingerprint(route: &str, body: &Value, version: u64) -> Fingerprint {
        let hash = Sha256::new().chain_update(route).chain_update([0]);
        hash.chain_update(version.to_le_bytes()).chain_update(body.to_string()).finalize().into()
    }

    /// The answer to an equal request.
    pub fn get(&self, of: &Fingerprint) -> Option<Value> {
        let answers = &mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.now += 1;
        let kept = answers.all.get_mut(of)?;
        kept.used = answers.now;
        Some(kept.answer.clone())
    }

    /// Keeps an answer, instead of those that were of use longest ago.
    pub fn put(&self, of: Fingerprint, answer: &Value) {
        let bytes = answer.to_string().len();
        if bytes > self.bytes {
            return;
        }
        let answers = &mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.now += 1;
        let kept = Kept { answer: answer.clone(), bytes, used: answers.now };
        answers.bytes += bytes;
        if let Some(before) = answers.all.insert(of, kept) {
            answers.bytes -= before.bytes;
        }
        while answers.bytes > self.bytes {
            let oldest = answers.all.iter().min_by_key(|(_, kept)| kept.used);
            let Some(oldest) = oldest.map(|(of, _)| *of) else { return };
            if let Some(gone) = answers.all.remove(&oldest) {
                answers.bytes -= gone.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_least_used_answer_goes() {
        let cache = Cache::new(10);
        let [a, b, c] = [1, 2, 3].map(|version| Cache::fingerprint("/", &json!({}), version));
        cache.put(a, &json!("aaa"));
        cache.put(b, &json!("bbb"));
        assert_eq!(cache.get(&a), Some(json!("aaa")));
        cache.put(c, &json!("cc"));
        assert_eq!(
            (cache.get(&a), cache.get(&b), cache.get(&c)),
            (Some(json!("aaa")), None, Some(json!("cc")))
        );
        cache.put(b, &json!("too long for it"));
        assert_eq!(cache.get(&b), None);
    }
}
