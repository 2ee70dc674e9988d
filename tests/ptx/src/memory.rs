//! Device memory: allocations with room between them, so that no access strays from one to another.

use std::collections::BTreeMap;

/// The first address that is given out, and the bytes between allocations.
const FIRST: u64 = 1 << 40;
const GAP: u64 = 1 << 20;
/// Of allocations, as the driver has it.
const ALIGN: u64 = 256;

/// All allocations, by address.
#[derive(Default)]
pub struct Memory {
    allocations: BTreeMap<u64, Box<[u8]>>,
    used: u64,
}

impl Memory {
    /// An empty memory.
    pub const fn new() -> Self {
        Self { allocations: BTreeMap::new(), used: 0 }
    }

    /// The address of `size` new bytes, all ones: NaN, or an index out of every range, until they are written.
    pub fn allocate(&mut self, size: usize) -> u64 {
        let address = FIRST + self.used;
        self.used += (size as u64 + GAP).next_multiple_of(ALIGN);
        self.place(address, vec![0xff; size]);
        address
    }

    /// Makes an allocation of `bytes` at an address where there is none.
    pub fn place(&mut self, address: u64, bytes: Vec<u8>) {
        self.allocations.insert(address, bytes.into_boxed_slice());
    }

    /// Gives an allocation back; whether the address was one's first.
    pub fn free(&mut self, address: u64) -> bool {
        self.allocations.remove(&address).is_some()
    }

    /// `size` bytes from an address on.
    ///
    /// # Errors
    /// They are not all in one allocation.
    pub fn bytes(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        let Some((start, bytes)) = self.allocations.range_mut(..=address).next_back() else {
            return Err(format!("{size} bytes at {address:#x}, before all device memory"));
        };
        let (first, total) = ((address - start) as usize, bytes.len());
        match first.checked_add(size).filter(|end| *end <= total) {
            Some(end) => Ok(&mut bytes[first..end]),
            None => Err(format!(
                "{size} bytes at offset {first} of an allocation of {total} at {start:#x}, or behind it in none"
            )),
        }
    }
}
