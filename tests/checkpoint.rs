//! Hostile and damaged safetensors files: refused with a message that names the file and the
//! tensor, without a panic and without an allocation larger than the file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use bitnet_model::{Result, checkpoint::Checkpoint};

/// A safetensors file of the given header text and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// One tensor's header entry.
fn tensor(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

fn open(folder: &Path, bytes: &[u8]) -> Result<Checkpoint> {
    let path = folder.join("hostile.safetensors");
    fs::write(&path, bytes).expect("the temporary folder is writable");
    Checkpoint::open(&[path])
}

#[test]
fn a_valid_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    let header = format!("{{{}}}", tensor("x", "F32", "[1]", 0, 4));
    let checkpoint = open(folder.path(), &file(&header, &1f32.to_le_bytes())).unwrap();
    assert_eq!(checkpoint.read_scale("x").unwrap(), 1.);
    assert_eq!(open(folder.path(), &file("{}  ", &[])).unwrap().names().len(), 0);
}

#[test]
fn headers_that_lie() {
    let deep = format!(r#"{{"x":{}1{}}}"#, "[".repeat(50_000), "]".repeat(50_000));
    let x = |dtype, shape, begin, end| format!("{{{}}}", tensor("x", dtype, shape, begin, end));
    let two = |a: (u64, u64), b: (u64, u64), second: &str| {
        let (first, second) =
            (tensor("x", "U8", "[2]", a.0, a.1), tensor(second, "U8", "[2]", b.0, b.1));
        format!("{{{first},{second}}}")
    };
    let cases: &[(&str, Vec<u8>, &[&str])] = &[
        ("empty file", vec![], &["0 bytes long"]),
        ("shorter than the length", vec![1, 2, 3], &["3 bytes long"]),
        ("length 2⁶⁴ - 1", [&[0xff; 8], &b"{}"[..]].concat(), &["18446744073709551615 bytes"]),
        ("length beyond the file", [&[3, 0, 0, 0, 0, 0, 0, 0], &b"{}"[..]].concat(), &["claims 3"]),
        ("no header", vec![0; 8], &["header is not valid"]),
        (
            "not UTF-8",
            file("{}", &[]).iter().map(|&b| if b > 8 { 0xff } else { b }).collect(),
            &["header is not valid"],
        ),
        (
            "not UTF-8 in the metadata",
            {
                let mut bytes = file(r#"{"__metadata__":{"format":"pt"}}"#, &[]);
                bytes[8 + 28] = 0xff;
                bytes
            },
            &["header is not valid"],
        ),
        ("metadata that is no text", file(r#"{"__metadata__":{"x":[1]}}"#, &[]), &["not valid"]),
        ("not JSON", file("PK\u{3}\u{4}", &[]), &["header is not valid"]),
        ("not an object", file("[1, 2]", &[]), &["an object of tensors"]),
        ("deep JSON", file(&deep, &[]), &["tensor `x`"]),
        ("trailing text", file("{} {}", &[]), &["trailing"]),
        ("not a tensor", file(r#"{"x":1}"#, &[]), &["tensor `x`"]),
        ("no shape", file(r#"{"x":{"dtype":"F32","data_offsets":[0,0]}}"#, &[]), &["`x`", "shape"]),
        ("unknown type", file(&x("Q4", "[1]", 0, 1), &[0]), &["tensor `x`", "Q4"]),
        ("negative dimension", file(&x("F32", "[-1]", 0, 4), &[0; 4]), &["tensor `x`", "-1"]),
        ("fractional dimension", file(&x("F32", "[1.5]", 0, 4), &[0; 4]), &["tensor `x`", "1.5"]),
        ("dimension beyond 2⁶⁴", file(&x("F32", "[1e30]", 0, 4), &[0; 4]), &["tensor `x`"]),
        (
            "shape overflow",
            file(&x("F32", "[4294967296,4294967296]", 0, 4), &[0; 4]),
            &["tensor `x`", "representable"],
        ),
        ("bits overflow", file(&x("U8", "[2305843009213693952]", 0, 4), &[0; 4]), &["tensor `x`"]),
        (
            "overflow behind a zero",
            file(&x("U8", "[0,4294967296,4294967296]", 0, 0), &[]),
            &["tensor `x`"],
        ),
        ("half a byte", file(&x("F4", "[3]", 0, 2), &[0; 2]), &["tensor `x`", "whole"]),
        (
            "wrong size",
            file(&x("BF16", "[4]", 0, 4), &[0; 4]),
            &["tensor `x`", "8 bytes", "span 4"],
        ),
        ("gap in front", file(&x("U8", "[2]", 1, 3), &[0; 3]), &["tensor `x`", "gap or overlap"]),
        ("backwards", file(&x("U8", "[2]", 2, 0), &[0; 2]), &["tensor `x`", "[2, 0]"]),
        ("gap", file(&two((0, 2), (3, 5), "y"), &[0; 5]), &["tensor `y`", "gap or overlap"]),
        ("overlap", file(&two((0, 2), (1, 3), "y"), &[0; 3]), &["tensor `y`", "gap or overlap"]),
        ("same bytes", file(&two((0, 2), (0, 2), "y"), &[0; 2]), &["`y`", "gap or overlap"]),
        ("same name", file(&two((0, 2), (2, 4), "x"), &[0; 4]), &["tensor `x` appears twice"]),
        ("offset 2⁶⁴ - 1", file(&x("U8", "[2]", 0, u64::MAX), &[0; 2]), &["tensor `x`"]),
        ("cut short", file(&x("U8", "[4]", 0, 4), &[0; 3]), &["4 bytes of data", "holds 3"]),
        ("something appended", file(&x("U8", "[4]", 0, 4), &[0; 5]), &["holds 5"]),
        (
            "larger than any file",
            file(&x("U8", "[1152921504606846976]", 0, 1 << 60), &[]),
            &["holds 0"],
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (case, bytes, messages) in cases {
        let error = open(folder.path(), bytes).expect_err(case).to_string();
        assert!(error.contains("hostile.safetensors"), "{case}: {error}");
        for message in *messages {
            assert!(error.contains(message), "{case}: {error}");
        }
        assert!(error.len() < 500, "{case}: {} bytes of message", error.len());
    }
}

#[test]
fn a_header_over_the_limit_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile.safetensors");
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(1 << 30).unwrap();
    let error = Checkpoint::open(&[path]).unwrap_err().to_string();
    assert!(error.contains("claims 100000001 bytes"), "{error}");
}

#[test]
fn not_a_file() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Checkpoint::open(&[]).unwrap_err().to_string().contains("at least one file"));
    let cases: [(PathBuf, &str); 2] = [
        (folder.path().into(), "not a regular file"),
        (folder.path().join("absent.safetensors"), "absent.safetensors"),
    ];
    for (path, message) in cases {
        let error = Checkpoint::open(std::slice::from_ref(&path)).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()) && error.contains(message), "{error}");
    }
}

#[test]
fn a_file_that_shrinks_while_open() {
    let folder = tempfile::tempdir().unwrap();
    let header = format!("{{{}}}", tensor("x", "F32", "[1024]", 0, 4096));
    let checkpoint = open(folder.path(), &file(&header, &[0; 4096])).unwrap();
    let path = folder.path().join("hostile.safetensors");
    fs::File::options().write(true).open(&path).unwrap().set_len(2048).unwrap();
    let error = checkpoint.read("x").unwrap_err().to_string();
    assert!(error.contains("hostile.safetensors: tensor `x`: cannot be read"), "{error}");
}

#[test]
fn scales_that_would_poison_every_logit() {
    let folder = tempfile::tempdir().unwrap();
    for bad in [f32::NAN, f32::INFINITY, 0., -1.] {
        let header = format!("{{{}}}", tensor("q_proj.weight_scale", "F32", "[1]", 0, 4));
        let checkpoint = open(folder.path(), &file(&header, &bad.to_le_bytes())).unwrap();
        let error = checkpoint.read_scale("q_proj.weight_scale").unwrap_err().to_string();
        assert!(error.contains("hostile.safetensors: tensor `q_proj.weight_scale`"), "{error}");
        assert!(error.contains("finite and positive"), "{error}");
    }
}
