//! What a process must not ask of the system, whoever runs it: seccomp filters.

use std::collections::BTreeMap;

use anyhow::Context;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter, sock_filter,
};

/// Calls that fail with "operation not permitted".
const FORBIDDEN: [&[i64]; 5] = [
    // Talking: sockets, and the queue through which they can be made unseen.
    &[
        libc::SYS_socket,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
    ],
    // Other processes.
    &[
        libc::SYS_kill,
        libc::SYS_tkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_process_madvise,
        libc::SYS_kcmp,
        libc::SYS_migrate_pages,
        libc::SYS_move_pages,
        libc::SYS_setpriority,
        libc::SYS_ioprio_set,
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setattr,
        libc::SYS_sched_setparam,
        libc::SYS_sched_setscheduler,
    ],
    // Files of others: Landlock does not look at owners, modes, times and attributes.
    &[
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        FCHMODAT2,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_utimensat,
        libc::SYS_setxattr,
        libc::SYS_lsetxattr,
        libc::SYS_fsetxattr,
        libc::SYS_removexattr,
        libc::SYS_lremovexattr,
        libc::SYS_fremovexattr,
        libc::SYS_name_to_handle_at,
        libc::SYS_open_by_handle_at,
        libc::SYS_quotactl,
        libc::SYS_fanotify_init,
    ],
    // The world as it is seen: namespaces and mounts.
    &[
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_mount_setattr,
    ],
    // The system itself, and parts of it that many have broken out through.
    &[
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_keyctl,
        libc::SYS_personality,
        libc::SYS_acct,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_reboot,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_syslog,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_clock_adjtime,
        libc::SYS_adjtimex,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
        libc::SYS_vhangup,
    ],
];

/// The older names of some of them, which other architectures never had.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// The same number everywhere; libc does not name it everywhere.
const FCHMODAT2: i64 = 452;

/// Takes the calls away from this process, for good.
///
/// # Errors
/// A system without filters.
pub fn forbid() -> anyhow::Result<()> {
    let set = || -> anyhow::Result<()> {
        // With arguments in a structure that no filter can look into: as if the system had no such call, for which the other
        // one is taken.
        apply(BTreeMap::from([(libc::SYS_clone3, vec![])]), libc::ENOSYS)?;
        apply(rules()?, libc::EPERM)
    };
    set().context("system calls cannot be forbidden")
}

fn rules() -> anyhow::Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let calls = FORBIDDEN.into_iter().chain([OLDER]).flatten();
    let mut rules = BTreeMap::from_iter(calls.map(|&call| (call, vec![])));
    let if_argument = |index, operator, value| -> anyhow::Result<_> {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    // Threads, but no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, if_argument(0, SeccompCmpOp::MaskedEq(thread), 0)?);
    // Signals and limits of its own.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, if_argument(0, SeccompCmpOp::Ne, own)?);
    rules.insert(libc::SYS_prlimit64, if_argument(0, SeccompCmpOp::Ne, 0)?);
    Ok(rules)
}

/// Forbids the calls that match a rule, all others being as they were.
fn apply(rules: BTreeMap<i64, Vec<SeccompRule>>, error: i32) -> anyhow::Result<()> {
    let refused = SeccompAction::Errno(error as u32);
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)?;
    let program: BpfProgram = filter.try_into()?;
    apply_filter(&[&no_other_numbers()[..], &program].concat())?;
    Ok(())
}

/// Refuses the second set of numbers that x86-64 has for the same calls (x32), which begin at 2³⁰. Others have none so high.
fn no_other_numbers() -> [sock_filter; 3] {
    const X32: u32 = 1 << 30;
    let step = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    let (load, jump_if_at_least, finish) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    );
    [
        step(load as u16, 0, 0), // the number is the first field
        step(jump_if_at_least as u16, 1, X32),
        step(finish as u16, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
    ]
}
