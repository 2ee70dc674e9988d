//! Memory in pages of 2 MiB, for weights, keys and values that are read from end to end for every token.
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

/// `len` zeros, in large pages where they fill such and the system has them. They become memory when they are first touched, or
/// are that already where [`keep_freed_memory`] kept some.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let mut zeros = vec![T::default(); len];
    #[cfg(target_os = "linux")]
    {
        let bytes = size_of_val(&zeros[..]);
        let before = zeros.as_ptr().cast::<u8>().align_offset(PAGE).min(bytes);
        let whole = (bytes - before) / PAGE * PAGE;
        // SAFETY: these pages are within the vector, and the advice changes no contents.
        let code = unsafe {
            let first = zeros.as_mut_ptr().cast::<u8>().add(before);
            libc::madvise(first.cast(), whole, libc::MADV_HUGEPAGE)
        };
        if code != 0 {
            let error = io::Error::last_os_error();
            tracing::debug!("keys and values lie in small pages: {error}"); // a kernel without large ones
        }
    }
    zeros
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

/// Which part of the mapping that holds `bytes`, as far as it is memory, lies in large pages; `None` where the system does
/// not count them.
pub fn large_part(bytes: &[u8]) -> Option<f64> {
    let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    large_part_in(&maps, bytes.as_ptr() as usize)
}

/// [`large_part`] of the mapping with this address, from the text of `smaps`: a line `first-last …` of addresses, then a
/// line for each property.
fn large_part_in(maps: &str, address: usize) -> Option<f64> {
    let holds = |line: &&str| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let [first, last] = range.map(|(first, last)| {
            [first, last].map(|address| usize::from_str_radix(address, 16).unwrap_or(0))
        })?;
        Some((first..last).contains(&address))
    };
    let mut properties = maps.lines().skip_while(|line| holds(line) != Some(true)).skip(1);
    let mut kib = |name: &str| -> Option<f64> {
        let value = properties.find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let (resident, large) = (kib("Rss:")?, kib("AnonHugePages:")?);
    (resident > 0.).then(|| large / resident)
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

    #[test]
    fn zeros_are_zero_wherever_their_pages_begin() {
        for len in [0, 1000, PAGE / 4, PAGE, 4 * PAGE + 7] {
            let mut values = zeros::<u32>(len);
            assert!(values.len() == len && values.iter().all(|&x| x == 0));
            values.fill(1); // what is kept and comes again is cleared
        }
    }

    #[test]
    fn large_pages_are_those_of_the_mapping() {
        let maps = "1000-2000 rw-p 00000000 00:00 0\nSize: 4 kB\nRss: 4 kB\nAnonHugePages: 0 kB\n\
                    200000-800000 rw-p 0 00:00 0\nRss:            4096 kB\nAnonHugePages:  2048 kB\n\
                    900000-a00000 rw-p 0 00:00 0\nRss: 0 kB\nAnonHugePages: 0 kB\n";
        assert_eq!(large_part_in(maps, 0x1fff), Some(0.));
        assert_eq!(large_part_in(maps, 0x7fffff), Some(0.5));
        assert_eq!(large_part_in(maps, 0x900000), None); // nothing of it is memory
        assert_eq!(large_part_in(maps, 0x800000), None);
        let mut part = Arena::default().zeroed(8 << 20).unwrap();
        part.fill(1);
        if cfg!(target_os = "linux") {
            assert!((0. ..=1.).contains(&large_part(&part).unwrap()));
        }
        let mut small = small_pages(2 * PAGE).unwrap();
        small.fill(1);
        assert_eq!(large_part(&small).unwrap_or(0.), 0.);
    }
}
