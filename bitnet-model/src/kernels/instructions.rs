//! What of a processor's instructions the kernels need, and what of that it has.

use super::{KERNELS, Kernel};

/// Instructions that a kernel needs.
#[derive(Clone, Copy)]
pub(super) struct Requirement {
    /// As the architecture names them.
    pub name: &'static str,
    /// Whether this processor has them.
    pub is_met: fn() -> bool,
}

/// A list of [`Requirement`]s from names as `std` detects them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! requirements {
    ($($name:tt),*) => {
        &[$($crate::kernels::instructions::Requirement {
            name: $name,
            #[cfg(target_arch = "x86_64")]
            is_met: || ::std::arch::is_x86_feature_detected!($name),
            #[cfg(target_arch = "aarch64")]
            is_met: || ::std::arch::is_aarch64_feature_detected!($name),
        }),*]
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use requirements;

/// A kernel of this architecture, whether or not this processor can run it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstructionSet {
    /// The kernel's [name](Kernel::name).
    pub kernel: &'static str,
    /// Instructions it needs.
    pub needs: Vec<&'static str>,
    /// Those of them that this processor, or who virtualizes it, lacks.
    pub missing: Vec<&'static str>,
}

/// All kernels of this architecture, fastest first.
pub fn instruction_sets() -> impl Iterator<Item = InstructionSet> {
    KERNELS.iter().map(|kernel| {
        let missing = kernel.requires.iter().filter(|requirement| !(requirement.is_met)());
        InstructionSet {
            kernel: kernel.name,
            needs: kernel.requires.iter().map(|requirement| requirement.name).collect(),
            missing: missing.map(|requirement| requirement.name).collect(),
        }
    })
}

impl Kernel {
    /// Whether this processor has all its instructions.
    pub(super) fn is_available(&self) -> bool {
        self.requires.iter().all(|requirement| (requirement.is_met)())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::available;

    #[test]
    fn a_kernel_lacks_nothing_or_is_not_there() {
        let complete = instruction_sets().filter(|set| set.missing.is_empty());
        assert!(complete.map(|set| set.kernel).eq(available().map(Kernel::name)));
        for set in instruction_sets() {
            assert!(set.missing.iter().all(|name| set.needs.contains(name)), "{set:?}");
        }
    }

    /// `avx512vbmi` takes routines of `avx512vnni`.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn a_kernel_needs_what_it_borrows_from_needs() {
        let needs = |kernel| instruction_sets().find(|set| set.kernel == kernel).unwrap().needs;
        let (own, borrowed) = (needs("avx512vbmi"), needs("avx512vnni"));
        assert!(!borrowed.is_empty() && borrowed.iter().all(|name| own.contains(name)));
    }
}
