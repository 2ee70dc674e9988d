//! Device memory: allocations at addresses that are no one else's, so that no access strays from one to another.

/// Bits of an address below the allocation's number.
const OFFSET_BITS: u32 = 40;

/// All that was allocated, by number; what was freed is `None`.
#[derive(Default)]
pub struct Memory {
    allocations: Vec<Option<Box<[u8]>>>,
}

impl Memory {
    /// An empty memory.
    pub const fn new() -> Self {
        Self { allocations: Vec::new() }
    }

    /// The address of `size` new bytes, all ones: NaN, or an index out of every range, until they are written.
    pub fn allocate(&mut self, size: usize) -> u64 {
        self.allocations.push(Some(vec![0xff; size].into_boxed_slice()));
        (self.allocations.len() as u64) << OFFSET_BITS
    }

    /// Gives an allocation back; whether the address was one's first.
    pub fn free(&mut self, address: u64) -> bool {
        let first = address & ((1 << OFFSET_BITS) - 1) == 0;
        first && self.slot(address).is_some_and(|slot| slot.take().is_some())
    }

    fn slot(&mut self, address: u64) -> Option<&mut Option<Box<[u8]>>> {
        let number = usize::try_from(address >> OFFSET_BITS).ok()?.checked_sub(1)?;
        self.allocations.get_mut(number)
    }

    /// `size` bytes from an address on.
    ///
    /// # Errors
    /// They are not all in one allocation, or it was freed.
    pub fn bytes(&mut self, address: u64, size: usize) -> Result<&mut [u8], String> {
        let number = address >> OFFSET_BITS;
        let Some(slot) = self.slot(address) else {
            return Err(format!("address {address:#x} is no device memory"));
        };
        let Some(bytes) = slot else {
            return Err(format!("address {address:#x} is in allocation {number}, which was freed"));
        };
        let (first, total) = ((address & ((1 << OFFSET_BITS) - 1)) as usize, bytes.len());
        match first.checked_add(size).filter(|end| *end <= total) {
            Some(end) => Ok(&mut bytes[first..end]),
            None => Err(format!(
                "{size} bytes at offset {first} of allocation {number}, which has {total}"
            )),
        }
    }
}
