//! `bitnet plot` as a user runs it: pictures of metrics, and what is said about files that are none.

#![allow(clippy::unwrap_used, missing_docs)] // test code

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn plot(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.arg("plot").args(args).current_dir(dir).output().unwrap()
}

/// The metrics of a run of 200 updates as an old version wrote them, with an evaluation and a last line cut short.
fn write_run(dir: &Path, scale: f64) {
    fs::create_dir_all(dir).unwrap();
    let line = |step: usize| {
        let loss = scale * (2. + 4. * (-(step as f64) / 40.).exp());
        format!(
            r#"{{"kind":"train","step":{step},"loss":{loss},"lr":0.001,"weight_decay":0.1,"grad_norm":{},"tokens":{},"tokens_per_second":900.5}}"#,
            loss / 3.,
            64 * step
        ) + "\n"
    };
    let evaluation = r#"{"kind":"evaluation","step":200,"nats_per_token":2.5,"nats_per_byte":0.7,"tokens":9,"seconds":0.5}"#;
    let lines: String = (1..=200).map(line).collect();
    fs::write(dir.join("metrics.jsonl"), format!("{lines}{evaluation}\n{{\"kind\":\"tr")).unwrap();
}

#[test]
fn pictures_hold_the_curves_and_the_names_of_the_runs() {
    let dir = tempfile::tempdir().unwrap();
    write_run(&dir.path().join("runs/first"), 1.);
    write_run(&dir.path().join("runs/second"), 1.5);
    let runs = ["runs/first", "runs/second/metrics.jsonl"];
    let output = plot(dir.path(), &[&runs[..], &["-o", "curves.svg"]].concat());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "curves.svg: 5 panels of 2 runs\n");
    let svg = fs::read_to_string(dir.path().join("curves.svg")).unwrap();
    for text in ["first", "second", "training loss", "held-out loss, nats per byte", "updates"] {
        assert!(svg.contains(&format!(">\n{text}\n<")), "{text}");
    }
    assert!(svg.matches("<polyline").count() > 8);

    for options in [&[][..], &["--log-x", "--log-y", "--x", "tokens", "--smooth", "9"]] {
        let output = plot(dir.path(), &[&runs[..], options].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let png = fs::read(dir.path().join("curves.png")).unwrap();
        let mut decoder = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; decoder.output_buffer_size().unwrap()];
        decoder.next_frame(&mut pixels).unwrap();
        let is_blue = |pixel: &&[u8]| *pixel == [0, 114, 178];
        assert!(pixels.chunks(3).filter(is_blue).count() > 2000);
    }

    let output = plot(dir.path(), &[&runs[..], &["--json", "--what", "loss"]].concat());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    let curve = &summary["runs"][1]["curves"]["evaluation/nats_per_byte"];
    assert_eq!((&curve["points"], &curve["last"]), (&1.into(), &serde_json::json!([200., 0.7])));
}

#[test]
fn what_is_no_run_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    write_run(&dir.path().join("run"), 1.);
    fs::create_dir(dir.path().join("none")).unwrap();
    fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    fs::write(dir.path().join("broken.jsonl"), "{\"kind\":\"train\",\"step\":1}\n").unwrap();
    for (args, reason) in [
        (&["missing"][..], "missing"),
        (&["none"], "none is no folder of a run"),
        (&["empty.jsonl"], "empty.jsonl: holds no record"),
        (&["broken.jsonl"], "broken.jsonl: line 1: missing field `loss`"),
        (&["run", "--what", "codes"], "--what `codes`"),
        (&["run", "-o", "curves.pdf"], "curves.pdf: the name must end in .png or .svg"),
        (&["run", "-o", "no/where.png"], "no/where.png"),
        (&["run", "--smooth", "0"], "--smooth"),
    ] {
        let output = plot(dir.path(), args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.contains(reason) && stderr.lines().count() == 1, "{stderr}");
    }
}
