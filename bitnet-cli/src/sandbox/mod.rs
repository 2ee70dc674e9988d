//! Runs a program in Python that nobody has read, where it can do no harm: no network, no files but its own, no other processes,
//! bounded time, memory and output.
//!
//! The program gets a process of its own, which is `bitnet sandboxed`: it builds walls around itself ([`walls`]) and then becomes
//! `python3`. What the walls do not keep out is a program that looks for the reference in its own memory, or for the word that it
//! has passed: they protect the machine, not the score.

#[cfg(target_os = "linux")]
mod system_calls;
#[cfg(target_os = "linux")]
pub mod walls;

use std::{
    env,
    ffi::OsStr,
    fmt,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

/// How programs are run.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Seconds of processor time; ten times as long by the clock, for a machine that has other things to do.
    pub seconds: u64,
    /// Runs where the system permits no namespaces, too.
    pub without_namespaces: bool,
}

/// Where programs run.
pub struct Sandbox {
    limits: Limits,
    /// The interpreter itself, not a script that looks for it.
    python: PathBuf,
    /// Where its library lies.
    folders: Vec<PathBuf>,
}

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It came to its end.
    Passed,
    /// It did not, with the reason.
    Failed(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
        }
    }
}

/// What the interpreter says on stderr once the walls stand.
const BEGAN: &str = "began";
/// The most that is read of what it says.
const SAID: u64 = 4096;
/// What the driver does: it closes what was left open for it, keeps its own way to the parent, sends all else that is said to
/// nowhere, and runs the program as
/// lm-evaluation-harness does (`code_eval` of Hugging Face's evaluate), that is not as `__main__`.
const DRIVER: &str = r#"
import os, sys
os.closerange(3, 1 << 16)
parent = os.dup(2)
os.dup2(1, 2)
say = lambda text: os.write(parent, text.encode("utf-8", "replace")[:1000])
word, program = sys.stdin.readline(), sys.stdin.read()
say("began\n")
try:
    exec(compile(program, "program", "exec"), {})
except BaseException as error:
    say(f"{type(error).__name__}: {error}")
    os._exit(1)
say(word)
os._exit(0)
"#;

impl Sandbox {
    /// Finds `python` and sees that it runs in the sandbox, and with `numpy` if programs `need_numpy`.
    ///
    /// # Errors
    /// A system that lacks a wall, or no such interpreter.
    pub fn new(python: &OsStr, limits: Limits, need_numpy: bool) -> anyhow::Result<Self> {
        ensure!(
            cfg!(target_os = "linux"),
            "generated programs run on Linux only, whose walls there are none of elsewhere"
        );
        const ASK: &str =
            "import sys\nprint(sys.executable, sys.prefix, sys.base_prefix, *sys.path, sep='\\n')";
        let name = || format!("{} cannot be run", python.display());
        let answer = Command::new(python).args(["-s", "-c", ASK]).output().with_context(name)?;
        let paths = String::from_utf8(answer.stdout).with_context(name)?;
        let mut paths = paths.lines().filter(|path| !path.is_empty()).map(PathBuf::from);
        let executable = paths.next().filter(|_| answer.status.success());
        let executable = executable.with_context(name)?;
        let mut folders = Vec::from_iter(paths);
        folders.sort();
        folders.dedup();
        let sandbox = Self { limits, python: executable, folders };
        let check = |program: &str, what: &str| match sandbox.run(program)? {
            Outcome::Passed => Ok(()),
            Outcome::Failed(reason) => {
                bail!("{} {what} in the sandbox: {reason}", sandbox.python.display())
            }
        };
        check("assert sum(range(4)) == 6", "runs no program")?;
        if need_numpy {
            check("import numpy", "has no numpy, which the tests of programs need,")?;
        }
        Ok(sandbox)
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// A wall that cannot be built, or a process that cannot be started. What a program does is no error.
    pub fn run(&self, program: &str) -> anyhow::Result<Outcome> {
        // Nothing is found here: the process lays a file system of its own over it.
        let scratch = tempfile::tempdir().context("no temporary folder can be made")?;
        let word = format!("passed {:032x}", rand::random::<u128>());
        let mut input: File = tempfile::tempfile().context("no temporary file can be made")?;
        write!(input, "{word}\n{program}")
            .and_then(|()| input.seek(SeekFrom::Start(0)).map(drop))?;
        let mut command = Command::new(env::current_exe().context("where this program lies")?);
        command.arg("sandboxed").args(["--seconds", &self.limits.seconds.to_string()]);
        command.args(["--parent", &std::process::id().to_string()]);
        command.arg("--scratch").arg(scratch.path());
        for folder in &self.folders {
            command.arg("--readable").arg(folder);
        }
        if self.limits.without_namespaces {
            command.arg("--without-namespaces");
        }
        command.arg("--").arg(&self.python).args(["-s", "-B", "-c", DRIVER]);
        command.env_clear().current_dir(scratch.path());
        for (name, value) in [("HOME", scratch.path()), ("TMPDIR", scratch.path())] {
            command.env(name, value);
        }
        for (name, value) in [
            ("PATH", "/usr/bin:/bin"),
            ("LANG", "C.UTF-8"),
            ("PYTHONHASHSEED", "0"),
            ("OMP_NUM_THREADS", "1"),
            ("OPENBLAS_NUM_THREADS", "1"),
        ] {
            command.env(name, value);
        }
        command.stdin(input).stdout(Stdio::null()).stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().context("no process can be started")?;
        let mut stderr = child.stderr.take().context("a process without stderr")?.take(SAID);
        // The pipe is closed when the one process that has it ends.
        let reader = thread::spawn(move || {
            let mut said = Vec::new();
            stderr.read_to_end(&mut said).map(|_| said)
        });
        let most = Duration::from_secs(self.limits.seconds.saturating_mul(10));
        let mut is_late = false;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > most && !is_late {
                is_late = true;
                child.kill()?;
            }
            thread::sleep(Duration::from_millis(2));
        };
        let said = reader.join().map_err(|_| anyhow::anyhow!("what it said cannot be read"))??;
        let said = String::from_utf8_lossy(&said);
        let Some(said) = said.strip_prefix(BEGAN).and_then(|said| said.strip_prefix('\n')) else {
            if is_late {
                return Ok(Outcome::Failed("out of time before it began".into()));
            }
            bail!("the sandbox cannot be built: {}", said.trim().trim_start_matches("error: "));
        };
        if status.success() && said.trim_end() == word {
            return Ok(Outcome::Passed);
        }
        let is_over_time = is_late || signal(status) == Some(SIGXCPU);
        Ok(Outcome::Failed(match (is_over_time, signal(status)) {
            (true, _) => "out of time".into(),
            (false, Some(signal)) => format!("ended by signal {signal}"),
            (false, None) if said.is_empty() => format!("left early with {status}"),
            (false, None) => said.lines().next().unwrap_or_default().chars().take(200).collect(),
        }))
    }
}

/// Sent to a process that has used its processor time.
const SIGXCPU: i32 = 24;

#[cfg(unix)]
fn signal(status: std::process::ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_: std::process::ExitStatus) -> Option<i32> {
    None
}
