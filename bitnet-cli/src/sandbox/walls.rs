//! The walls that a process builds around itself. None of them needs privileges, and none can be taken down from inside.
//!
//! | what | wall |
//! |---|---|
//! | other processes, network, what others own | system calls ([`system_calls`]) |
//! | files | Landlock: the interpreter's can be read, all else neither read nor written |
//! | network, shared memory, mounts, privileges | namespaces of its own |
//! | files of its own | a file system of 16 MiB in memory |
//! | time, memory, sizes | resource limits |
//! | a parent that is gone | a signal that ends it |

use std::{
    fs,
    os::unix::process::parent_id,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        resource::{Resource, rlim_t, setrlimit},
        signal::Signal,
    },
    unistd::{getgid, getuid, setsid},
};

use super::system_calls;

/// What to build.
#[derive(Debug)]
pub struct Walls {
    /// Seconds of processor time.
    pub seconds: u64,
    /// The process that waits for this one.
    pub parent: u32,
    /// An empty folder to work in.
    pub scratch: PathBuf,
    /// Folders that may be read, beside those of the system's programs.
    pub readable: Vec<PathBuf>,
    /// Goes on where the system permits no namespaces.
    pub without_namespaces: bool,
}

/// What an interpreter may read of the system: programs and libraries.
const SYSTEM: [&str; 13] = [
    "/bin",
    "/lib",
    "/lib32",
    "/lib64",
    "/usr",
    "/nix/store",
    "/gnu/store",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/alternatives",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
];

const MEBIBYTE: rlim_t = 1 << 20;
/// Address space: an interpreter with numpy takes about a third.
const MEMORY: rlim_t = 1024 * MEBIBYTE;
/// The user inside, who is nobody outside.
const USER: u32 = 1000;

/// Builds all of them around this process, which must have one thread.
///
/// # Errors
/// A wall that the system does not have.
pub fn build(walls: &Walls) -> anyhow::Result<()> {
    setsid().context("it stays in its parent's session")?;
    let is_alone = match own_namespaces(&walls.scratch) {
        Ok(()) => true,
        Err(_) if walls.without_namespaces => false,
        Err(error) => bail!(
            "{error:#}. Allow unprivileged user namespaces (kernel.unprivileged_userns_clone, \
             kernel.apparmor_restrict_unprivileged_userns; in a container its seccomp profile), or pass --without-namespaces"
        ),
    };
    // A change of credentials takes it back, so this comes behind the namespaces.
    set_pdeathsig(Signal::SIGKILL).context("it cannot end with its parent")?;
    ensure!(parent_id() == walls.parent, "its parent is gone");
    limit(walls.seconds)?;
    confine_files(walls, is_alone)?;
    system_calls::forbid()
}

/// Leaves everything behind that processes share.
fn own_namespaces(scratch: &Path) -> anyhow::Result<()> {
    let (user, group) = (getuid(), getgid());
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )
    .context("namespaces are not permitted")?;
    for (file, content) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("{USER} {user} 1")),
        ("/proc/self/gid_map", format!("{USER} {group} 1")),
    ] {
        fs::write(file, content).with_context(|| format!("namespaces: {file}"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("namespaces: its mounts are seen outside")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = Some("size=16m,nr_inodes=512,mode=0700");
    mount(Some("tmpfs"), scratch, Some("tmpfs"), flags, options)
        .context("namespaces: no file system in memory")?;
    std::env::set_current_dir(scratch).context("namespaces: its folder")
}

fn limit(seconds: u64) -> anyhow::Result<()> {
    for (resource, soft, hard) in [
        // The first is a signal that says why, the second cannot be ignored.
        (Resource::RLIMIT_CPU, seconds, seconds + 1),
        (Resource::RLIMIT_AS, MEMORY, MEMORY),
        (Resource::RLIMIT_FSIZE, 16 * MEBIBYTE, 16 * MEBIBYTE),
        (Resource::RLIMIT_NOFILE, 64, 64),
        (Resource::RLIMIT_NPROC, 64, 64),
        (Resource::RLIMIT_CORE, 0, 0),
        (Resource::RLIMIT_MEMLOCK, 0, 0),
    ] {
        setrlimit(resource, soft, hard).with_context(|| format!("limit {resource:?}"))?;
    }
    Ok(())
}

/// `is_alone`: the scratch folder is a file system of its own, which may be filled.
fn confine_files(walls: &Walls, is_alone: bool) -> anyhow::Result<()> {
    // Before the third version of Landlock files can be truncated without being opened.
    let abi = ABI::V3;
    let system = SYSTEM.iter().map(PathBuf::from).chain(walls.readable.iter().cloned());
    let scratch = if is_alone { AccessFs::from_all(abi) } else { AccessFs::from_read(abi) };
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .context("files cannot be confined: that needs Landlock, in Linux 6.2 or later")?
        // What later versions add, where there is one.
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules(system, AccessFs::from_read(abi)))?
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::from_file(abi)))?
        .add_rules(path_beneath_rules([&walls.scratch], scratch))?;
    let status = ruleset.restrict_self()?;
    ensure!(status.ruleset != RulesetStatus::NotEnforced, "files are not confined");
    Ok(())
}
