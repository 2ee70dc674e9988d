//! Memory for panels, which each thread keeps: to allocate and clear it would take as long as to fill it.

use std::cell::RefCell;

use bytemuck::Pod;

thread_local! {
    /// A task of one product may begin another product.
    static KEPT: RefCell<Vec<Vec<u32>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with `len` values of four bytes, which may be any.
pub(super) fn scratch<T: Pod, R>(len: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
    let kept = KEPT.with_borrow_mut(Vec::pop).filter(|kept| kept.len() >= len);
    let mut kept = kept.unwrap_or_else(|| vec![0; len]);
    let result = work(bytemuck::cast_slice_mut(&mut kept[..len]));
    KEPT.with_borrow_mut(|all| all.push(kept));
    result
}
