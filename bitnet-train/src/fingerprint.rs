//! Hashes that are the same on every machine, of what nobody forges: FNV-1a tells contents apart, SplitMix64 puts numbers into
//! random orders.

use std::hash::Hasher;

/// The hash of the bytes written so far; integers are written in little-endian order on every machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// The hash of `text`.
    pub fn of(text: &str) -> u64 {
        let mut hash = Self::default();
        hash.write(text.as_bytes());
        hash.finish()
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write(&value.to_le_bytes());
    }

    fn write_u64(&mut self, value: u64) {
        self.write(&value.to_le_bytes());
    }

    fn write_u128(&mut self, value: u128) {
        self.write(&value.to_le_bytes());
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A bijection of 64 bits without visible pattern (the finalizer of SplitMix64): a number's place in a random order.
pub(crate) fn scatter(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The place of number `index` in the random order that `seed` gives.
pub(crate) fn place(seed: u64, index: u64) -> u64 {
    scatter(scatter(seed) ^ index)
}
