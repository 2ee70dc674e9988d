//! Programs that a model writes: they run only if that was said to be right, and cannot do any harm.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)] // test code

mod support;

use std::{fs, net::TcpListener, path::Path, process::Output};

use serde_json::{Value, json};
use support::{bitnet, failure, stdout, text};

fn fixtures() -> String {
    format!("{}/../tests/fixtures/eval", env!("CARGO_MANIFEST_DIR"))
}

/// A question behind whose function the model writes a token of a comment, and which is then tested by `test`.
fn question(test: &str) -> Value {
    let prompt = "def one():\n    return 1\n# This";
    json!({"prompt": prompt, "entry_point": "one", "test": format!("{test}\ndef check(f):\n    assert f() == 1\n")})
}

fn evaluate(folder: &Path, flags: &[&str]) -> Output {
    let output = folder.join("kept.jsonl");
    let _ = fs::remove_file(&output);
    let args = ["eval", "-q", "--tasks", "humaneval_plus", "--data", text(folder), "--json"];
    let fixed = ["--max-new-tokens", "1", "--code-timeout", "1", "-o", text(&output)];
    let mut command = bitnet(&[&args, &fixed[..], flags].concat());
    command.env("A_SECRET", "hidden").env("TMPDIR", folder).output().unwrap()
}

/// The outcome of each program; `None` on a system that cannot confine them.
fn outcomes(folder: &Path, programs: &[&str]) -> Option<Vec<String>> {
    let lines = programs.iter().map(|program| format!("{}\n", question(program)));
    fs::write(folder.join("humaneval_plus.jsonl"), lines.collect::<String>()).unwrap();
    let mut found = evaluate(folder, &["--allow-code-execution"]);
    let mut error = String::from_utf8(found.stderr).unwrap();
    if error.contains("--without-namespaces") {
        eprintln!("the system permits no namespaces: tested without them");
        found = evaluate(folder, &["--allow-code-execution", "--without-namespaces"]);
        error = String::from_utf8(found.stderr).unwrap();
    }
    if error.contains("needs Landlock") {
        eprintln!("PASSED OVER: {error}");
        return None;
    }
    assert!(found.status.success(), "{error}");
    let kept = fs::read_to_string(folder.join("kept.jsonl")).unwrap();
    let lines = kept.lines().skip(1).map(|line| serde_json::from_str::<Value>(line).unwrap());
    let mut lines = Vec::from_iter(lines);
    lines.sort_by_key(|line| line["item"].as_u64());
    let passed = lines.iter().filter(|line| line["outcome"] == "passed").count();
    let report: Value = serde_json::from_slice(&found.stdout).unwrap();
    let part = report["results"]["humaneval_plus"]["pass@1,create_test"].as_f64().unwrap();
    assert!((part - passed as f64 / programs.len() as f64).abs() < 1e-12);
    Some(lines.iter().map(|line| line["outcome"].as_str().unwrap().to_owned()).collect())
}

#[test]
fn programs_run_only_if_that_is_allowed() {
    let args = ["eval", "--tasks", "humaneval_plus", "--data", &fixtures()];
    let error = failure(&args, "");
    assert!(error.contains("pass --allow-code-execution"), "{error}");
    // What would be asked can be seen without.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("asked.jsonl");
    stdout(&[&args[..], &["--requests-only", text(&file)]].concat(), "");
    let asked = fs::read_to_string(file).unwrap();
    assert_eq!(asked.lines().count(), 3);
    let first: Value = serde_json::from_str(asked.lines().next().unwrap()).unwrap();
    assert_eq!(first["until"], json!(["\nclass", "\ndef", "\n#", "\nif", "\nprint"]));
    assert!(first["target"].as_str().unwrap().ends_with("\ncheck(larger)"));
    let error =
        failure(&[&args[..], &["--allow-code-execution", "--python", "no-python"]].concat(), "");
    assert!(error.contains("no-python cannot be run"), "{error}");
}

#[test]
fn programs_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let secret = dir.path().join("secret.txt");
    fs::write(&secret, "secret").unwrap();
    let outside = dir.path().join("outside.txt");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let permission = "failed: PermissionError";
    let time = "failed: out of time";
    let (secret_, outside_) = (text(&secret), text(&outside));
    let cases = [
        ("import os\nopen('a', 'w').close()".to_owned(), ""),
        ("assert one() == 2, 'no'".into(), "failed: AssertionError: no"),
        ("import sys\nsys.exit(0)".into(), "failed: SystemExit: 0"),
        ("import os\nos._exit(0)".into(), "failed: left early"),
        ("def (".into(), "failed: SyntaxError"),
        // Time.
        ("while True: pass".into(), time),
        ("import time\ntime.sleep(600)".into(), time),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass".into(), "failed: "),
        // Processes: a fork bomb, children that outlive, signals.
        ("import os\nwhile True: os.fork()".into(), permission),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass".into(), time),
        ("import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)".into(), permission),
        ("import os\nos.posix_spawn('/bin/sleep', ['sleep', '600'], {})".into(), permission),
        ("import os\nos.kill(os.getppid(), 9)".into(), permission),
        ("import os\nos.kill(-1, 9)".into(), permission),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()".into(), "failed: "),
        // Memory and output.
        ("bytearray(1 << 34)".into(), "failed: MemoryError"),
        ("import sys\nwhile True: print('x' * 100000); sys.stderr.write('x' * 100000)".into(), time),
        // Files.
        (format!("open({outside_:?}, 'w')"), permission),
        (format!("open({secret_:?}).read()"), permission),
        (format!("import os\nos.unlink({secret_:?})"), permission),
        (format!("import os\nos.truncate({secret_:?}, 0)"), permission),
        (format!("import os\nos.chmod({secret_:?}, 0)"), permission),
        (format!("import os\nos.symlink({secret_:?}, 'link')\nopen('link').read()"), permission),
        ("open('/proc/self/environ').read()".into(), permission),
        ("for i in range(99):\n  with open(f'f{i}', 'wb') as f: f.write(bytes(1 << 22))".into(), "failed: "),
        ("import os\nassert 'A_SECRET' not in os.environ and os.environ['HOME'] == os.getcwd()".into(), ""),
        // Network.
        (format!("import socket\nsocket.create_connection(('127.0.0.1', {port}))"), permission),
        ("import socket\nsocket.socket(socket.AF_UNIX)".into(), permission),
        ("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)".into(), permission),
        // The second set of numbers of system calls: fork is 57.
        ("import ctypes\nassert ctypes.CDLL(None).syscall(57 | 1 << 30) == -1".into(), ""),
    ];
    let programs = Vec::from_iter(cases.iter().map(|(program, _)| program.as_str()));
    let Some(outcomes) = outcomes(dir.path(), &programs) else { return };
    assert_eq!(outcomes.len(), cases.len());
    for ((program, expected), outcome) in cases.iter().zip(&outcomes) {
        let is_right = match *expected {
            "" => outcome == "passed",
            expected => outcome.starts_with(expected),
        };
        assert!(is_right, "{program}\n{outcome}");
    }
    assert!(!outside.exists());
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret");
    assert!(listener.accept().is_err());
    // Nothing is left that runs: all of them lived here.
    let home = format!("HOME={}", text(dir.path()));
    let left = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let environment = fs::read(entry.ok()?.path().join("environ")).ok()?;
        String::from_utf8_lossy(&environment).contains(&home).then_some(())
    });
    assert_eq!(left.count(), 0);
}
