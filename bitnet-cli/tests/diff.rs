//! `bitnet diff`: two models, tensor by tensor.

#![allow(clippy::unwrap_used)] // helpers of tests

mod support;

use std::fs;

use bitnet_model::pretrained::default_files;
use serde_json::{Value, json};
use support::{fixture, run, stdout, text};

#[test]
fn forms_of_one_model_are_equal_and_others_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let latent = folder.path().join("latent");
    stdout(&["convert", "-q", "default", text(&latent), "--to", "latent"], "");
    let same = stdout(&["diff", "-q", "--exit-code", "default", text(&latent)], "");
    assert_eq!(same, "68 tensors equal, 0 different\n");
    let [tied, untied] = ["bitnet_packed_tied", "bitnet_packed_untied"].map(fixture);
    let said = stdout(&["diff", "-q", text(&tied), text(&untied)], "");
    assert!(said.lines().any(|line| line.ends_with("only in B") && line.starts_with("lm_head")));
    assert!(said.contains("of the other sign, scale"), "{said}");
    let shapes = stdout(&["diff", "-q", "default", text(&tied)], "");
    assert!(shapes.contains("[2048, 256] in A, ["), "{shapes}");
}

/// One packed byte is changed, and one bf16 of a norm.
#[test]
fn each_change_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in default_files() {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let start = |name: &str| 8 + len + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    let (codes, norm) = ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight");
    let at = start(codes);
    let before = bytes[at];
    // The first two of its four codes become 0 and 2, −1 and 1.
    bytes[at] = before & 0xf0 | 0b1000;
    let old = [before & 3, before >> 2 & 3];
    let changed = usize::from(old[0] != 0) + usize::from(old[1] != 2);
    let flipped = usize::from(old[0] == 2) + usize::from(old[1] == 0);
    let at = start(norm);
    let value = f32::from_bits(u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])) << 16);
    bytes[at..at + 2].copy_from_slice(&[0x80, 0x40]); // 4 in bf16
    fs::write(&path, bytes).unwrap();
    let other = text(folder.path());
    let report: Value =
        serde_json::from_str(&stdout(&["diff", "-q", "--json", "default", other], "")).unwrap();
    assert_eq!((&report["equal"], &report["different"]), (&json!(66), &json!(2)));
    let tensor = |name: &str| {
        let mut tensors = report["tensors"].as_array().unwrap().iter();
        tensors.find(|tensor| tensor["name"] == name).unwrap().clone()
    };
    let found = tensor(codes);
    assert_eq!(
        (&found["codes_changed"], &found["codes_flipped"]),
        (&json!(changed), &json!(flipped))
    );
    let found = tensor(norm);
    assert_eq!((&found["changed"], &found["largest"]), (&json!(1), &json!((4. - value).abs())));
    let fails = run(&["diff", "-q", "--exit-code", "default", other], "");
    assert_eq!(fails.status.code(), Some(1));
    assert!(String::from_utf8(fails.stderr).unwrap().contains("in 2 tensors"));
}
