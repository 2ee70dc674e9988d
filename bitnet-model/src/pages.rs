//! Memory in pages of 2 MiB, for weights that are read from end to end for every token.
//!
//! A processor's prefetchers and address translation work page by page: from 2 MiB pages two threads read up to 1.9 times
//! as fast as from 4 KiB pages. A matrix alone is often smaller than such a page, so an [`Arena`] lays many side by side.

#![allow(unsafe_code)] // disjoint parts of one mapping; every block states why that is sound

use std::{
    io,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use memmap2::{MmapMut, MmapOptions};

/// Bytes of a large page on x86-64, and on aarch64 with 4 KiB base pages.
const PAGE: usize = 2 << 20;

/// Bytes mapped at once, twice as many each time; they become memory when they are first touched. Few large mappings, because
/// the last page of each is used in part.
const SLAB: usize = 64 << 20;
const LARGEST_SLAB: usize = 512 << 20;

/// Every part begins at a cache line.
const LINE: usize = 64;

/// Makes the allocator keep large blocks that were freed, for the next operation of the same size. Without it, glibc gives
/// them back to the system, and every operation over many tokens waits for fresh pages. To be called once, first thing
/// in `main`; without effect on systems other than Linux with glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Blocks up to this size come from the heap, which shrinks only when this much is free at its end.
        const LIMIT: i32 = 1 << 30;
        // SAFETY: `mallopt` takes two numbers and sets parameters of the allocator.
        let kept = unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LIMIT)
                & libc::mallopt(libc::M_TRIM_THRESHOLD, LIMIT)
        };
        if kept == 0 {
            tracing::debug!("the allocator does not keep freed memory");
        }
    }
}

/// Gives back to the system what was freed so far, also if [`keep_freed_memory`] keeps it. Without effect on systems other
/// than Linux with glibc.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` gives unused memory back and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Hands out zeroed memory. What it handed out lives on without it.
#[derive(Debug, Default)]
pub struct Arena(Mutex<Option<Cursor>>);

/// The slab that parts are cut from, and how far it is used.
#[derive(Debug)]
struct Cursor {
    slab: Arc<Slab>,
    used: usize,
}

/// One mapping, freed with its last part.
#[derive(Debug)]
struct Slab {
    first: *mut u8,
    len: usize,
    _mapping: MmapMut,
}

// SAFETY: a slab is memory and says where it lies; the memory is reached through parts, which are disjoint.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// Some bytes of an arena.
#[derive(Debug)]
pub struct Pages {
    slab: Arc<Slab>,
    start: usize,
    len: usize,
}

impl Slab {
    fn new(len: usize) -> io::Result<Self> {
        // One page more than needed, so that whole pages can begin at a page.
        let mut mapping = MmapOptions::new().len(len + PAGE).map_anon()?;
        #[cfg(target_os = "linux")]
        if let Err(error) = mapping.advise(memmap2::Advice::HugePage) {
            tracing::debug!("weights lie in small pages: {error}"); // a kernel without them
        }
        let skip = mapping.as_ptr().align_offset(PAGE).min(PAGE);
        // SAFETY: skip ≤ PAGE is within the mapping.
        let first = unsafe { mapping.as_mut_ptr().add(skip) };
        Ok(Self { first, len, _mapping: mapping })
    }
}

impl Arena {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// The system has no more memory.
    pub fn zeroed(&self, len: usize) -> io::Result<Pages> {
        let size = len.next_multiple_of(LINE);
        let mut cursor = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (slab, start) = match &*cursor {
            Some(Cursor { slab, used }) if size <= slab.len - used => (slab.clone(), *used),
            last => {
                let next = last.as_ref().map_or(SLAB, |last| (2 * last.slab.len).min(LARGEST_SLAB));
                (Arc::new(Slab::new(size.next_multiple_of(SLAB).max(next))?), 0)
            }
        };
        *cursor = Some(Cursor { slab: slab.clone(), used: start + size });
        Ok(Pages { slab, start, len })
    }
}

/// `len` zeroed bytes in pages of the usual size, to measure what large ones gain.
///
/// # Errors
/// The system has no more memory.
pub fn small_pages(len: usize) -> io::Result<MmapMut> {
    let mapping = MmapOptions::new().len(len).map_anon()?;
    #[cfg(target_os = "linux")]
    if let Err(error) = mapping.advise(memmap2::Advice::NoHugePage) {
        tracing::debug!("pages may be large: {error}"); // a kernel without large pages
    }
    Ok(mapping)
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: start + len ≤ slab.len, the mapping lives as long as `slab`, is zeroed and so initialized; `zeroed` gave
        // these bytes to this value alone, so whoever writes them holds it mutably.
        unsafe { std::slice::from_raw_parts(self.slab.first.add(self.start), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.slab.first.add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zeroed_disjoint_and_outlive_their_arena() {
        let arena = Arena::default();
        let sizes = [1, 64, 100, 0, 3 << 20, SLAB - 5, SLAB + 1];
        let mut parts: Vec<Pages> = sizes.iter().map(|&len| arena.zeroed(len).unwrap()).collect();
        drop(arena);
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.len(), sizes[i]);
            assert!(part.iter().all(|&byte| byte == 0));
            assert_eq!(part.as_ptr().align_offset(LINE), 0);
            part.fill(i as u8 + 1);
        }
        for (i, part) in parts.iter().enumerate() {
            assert!(part.iter().all(|&byte| byte == i as u8 + 1));
        }
    }
}
