//! Which kernel this process computes with: the fastest, or the one that was asked for.

use std::{env, sync::OnceLock};

use super::{Kernel, available, by_name, scalar};

/// The environment variable that names the kernel to use where [`choose`] was not called.
pub const KERNEL_VARIABLE: &str = "BITNET_KERNEL";

static ACTIVE: OnceLock<&'static Kernel> = OnceLock::new();

/// Why a kernel cannot be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// The processor lacks its instructions, or there is no such kernel.
    #[error("there is no kernel `{name}` for this processor: take one of {}", .available.join(", "))]
    Unavailable {
        /// As asked for.
        name: String,
        /// Those there are, fastest first.
        available: Vec<&'static str>,
    },
    /// Something was computed already, with another one.
    #[error("the kernel `{active}` is in use already: choose `{name}` before anything is computed")]
    InUse {
        /// As asked for.
        name: String,
        /// The one in use.
        active: &'static str,
    },
}

/// Makes the kernel with this [name](Kernel::name) the [active] one, before anything is computed.
///
/// # Errors
/// A kernel that this processor cannot run, or another one is in use already.
pub fn choose(name: &str) -> Result<&'static Kernel, ChoiceError> {
    let Some(kernel) = by_name(name) else {
        let available = available().map(Kernel::name).collect();
        return Err(ChoiceError::Unavailable { name: name.into(), available });
    };
    let active = *ACTIVE.get_or_init(|| kernel);
    match active.name() == kernel.name() {
        true => Ok(active),
        false => Err(ChoiceError::InUse { name: name.into(), active: active.name() }),
    }
}

/// The kernel of this process: what [`choose`] said, else what [`KERNEL_VARIABLE`] names if the processor can run it,
/// else the fastest.
pub fn active() -> &'static Kernel {
    ACTIVE.get_or_init(|| {
        let named = env::var(KERNEL_VARIABLE).ok().and_then(|name| by_name(&name));
        named.or_else(|| available().next()).unwrap_or(&scalar::KERNEL)
    })
}
