//! Memory, and whether weights get the large pages that they ask for.

use std::{fs, path::Path};

use bitnet_model::pages::{self, Arena};
use serde::Serialize;

use crate::machine::{Machine, available_memory, chosen};

/// Bytes that are tried, as many as weights are laid out in at first.
const TRIED: usize = 64 << 20;

/// The part of them from which on weights count as lying in large pages: the ends of a mapping may not.
pub const MOST: f64 = 0.9;

/// What there is to hold a model.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// Bytes there are.
    pub total_bytes: Option<u64>,
    /// Bytes that this process may still take.
    pub available_bytes: Option<u64>,
    /// When transparent huge pages are granted: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// What is done to find one: `always`, `defer`, `defer+madvise`, `madvise` or `never`.
    pub huge_page_defrag: Option<String>,
    /// The part of weights that lies in them, as tried.
    pub large_part: Option<f64>,
}

impl Memory {
    /// Looks, and tries; the system's files lie below `root`.
    pub fn examine(root: &Path, machine: &Machine) -> Self {
        let available_bytes = available_memory(root);
        let fits = available_bytes.is_none_or(|bytes| bytes / 4 > TRIED as u64);
        let defrag = root.join("sys/kernel/mm/transparent_hugepage/defrag");
        Self {
            total_bytes: machine.memory_bytes,
            available_bytes,
            huge_pages: machine.huge_pages.clone(),
            huge_page_defrag: fs::read_to_string(defrag).ok().and_then(|text| chosen(&text)),
            large_part: fits.then(try_large_pages).flatten(),
        }
    }
}

/// The part of some memory for weights that lies in large pages.
fn try_large_pages() -> Option<f64> {
    let mut weights = Arena::default().zeroed(TRIED).ok()?;
    weights.fill(1); // memory is there once it is written
    pages::large_part(&weights)
}
