//! The sampler's distributions against those of transformers' logits processors.

use bitnet_model::sampler::{Sampler, SamplingParams};
use flate2::read::GzDecoder;
use serde_json::Value;

#[test]
fn distributions_equal_the_reference() {
    let fixture = GzDecoder::new(&include_bytes!("fixtures/sampler.json.gz")[..]);
    let fixture: Value = serde_json::from_reader(fixture).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 30);
    for case in cases {
        let params = &case["params"];
        let number = |name: &str, neutral: f32| params[name].as_f64().map_or(neutral, |v| v as f32);
        let sampler = Sampler::new(SamplingParams {
            temperature: number("temperature", 1.),
            top_k: params["top_k"].as_u64().map(|k| k as usize),
            top_p: number("top_p", 1.),
            min_p: number("min_p", 0.),
            repetition_penalty: number("repetition_penalty", 1.),
            ..Default::default()
        })
        .unwrap();
        let logits: Vec<f32> = serde_json::from_value(case["logits"].clone()).unwrap();
        let history: Vec<u32> = serde_json::from_value(case["history"].clone()).unwrap();
        let (prompt, generated) = history.split_at(4);
        let got = sampler.distribution(&logits, prompt, generated).unwrap();
        let kept = case["kept"].as_object().unwrap();
        assert_eq!(got.len(), kept.len(), "{params}");
        for (id, p) in got {
            let expected = kept[&id.to_string()].as_f64().unwrap();
            // torch's softmax is f32, printed to six digits.
            assert!((p - expected).abs() < 2e-6, "{params}: token {id}: {p}, not {expected}");
        }
    }
}
