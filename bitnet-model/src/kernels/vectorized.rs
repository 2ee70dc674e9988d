//! Ordinary loops with the widest vectors of the processor.
//!
//! The crate is compiled for the oldest processor of its architecture, so a plain loop over a slice becomes code with short
//! vectors. A [`Loop`] is compiled once for each level of instructions, and the one that fits the processor runs. Results do
//! not depend on it: the compiler neither reorders nor fuses float operations.

/// A loop over slices.
pub trait Loop {
    /// What it computes.
    type Output;

    /// The loop. Must be `#[inline(always)]`, as everything it calls: a function of its own is compiled without the
    /// instructions.
    fn run(self) -> Self::Output;
}

/// Runs a loop compiled for this processor.
#[inline]
pub fn vectorized<L: Loop>(work: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512<L: Loop>(work: L) -> L::Output {
            work.run()
        }
        #[target_feature(enable = "avx2")]
        fn avx2<L: Loop>(work: L) -> L::Output {
            work.run()
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has the features.
            return unsafe { avx512(work) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { avx2(work) };
        }
    }
    work.run()
}
