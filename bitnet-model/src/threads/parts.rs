//! Parts of slices and matrices for the threads that fill them.
//!
//! What a task fills is cleared, if at all, by its own thread: a `vec![0.; n]` clears all of it on one thread while the
//! others wait, and out of every cache.

#![allow(unsafe_code)] // parts of one slice go to several threads; every block states why they are disjoint

use std::marker::PhantomData;

use super::{count, for_each};

/// Calls `task` with the number and the elements of every `size`-element chunk of `out`; the last may be shorter.
///
/// # Panics
/// If `size` is 0 or a task panics.
pub fn for_each_chunk<T: Send>(out: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    let tasks = out.len().div_ceil(size);
    for_each_chunk_pair((out, size), (&mut vec![(); tasks], 1), |index, out, _| task(index, out));
}

/// [`for_each_chunk`] of two slices that have equally many chunks.
///
/// # Panics
/// As [`for_each_chunk`], and if the numbers of chunks differ.
pub fn for_each_chunk_pair<A: Send, B: Send>(
    (a, a_size): (&mut [A], usize),
    (b, b_size): (&mut [B], usize),
    task: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let (a_len, b_len, tasks) = (a.len(), b.len(), a.len().div_ceil(a_size));
    assert_eq!(tasks, b_len.div_ceil(b_size), "chunks of {a_size} and of {b_size} elements");
    let (a, b) = (Start(a.as_mut_ptr()), Start(b.as_mut_ptr()));
    for_each(tasks, |index| {
        // SAFETY: `for_each` calls with every index once, so that the chunks are disjoint.
        unsafe { task(index, a.chunk(index, a_size, a_len), b.chunk(index, b_size, b_len)) };
    });
}

/// Cuts the row-major matrix `out` into blocks of `rows` rows, the last of fewer, and columns `cuts[j]..cuts[j + 1]`;
/// `cuts` begins with 0 and ends with the number of columns. Calls `task` with the first row of each block, the number
/// `j` of its columns, and the block. Blocks of the same rows come one after the other.
///
/// # Panics
/// If `out` is no whole number of rows, `cuts` does not ascend, `rows` is 0, or a task panics.
pub fn for_each_block<T: Send>(
    out: &mut [T],
    rows: usize,
    cuts: &[usize],
    task: impl Fn((usize, usize), Block<'_, T>) + Sync,
) {
    let cols = cuts.last().copied().unwrap_or(0);
    let all_rows = out.len().checked_div(cols).unwrap_or(0);
    assert_eq!(all_rows * cols, out.len(), "{} elements are no rows of {cols}", out.len());
    // SAFETY: `out` is that large.
    unsafe { blocks(Start(out.as_mut_ptr()), all_rows, rows, cuts, task) };
}

/// What `task` makes of each of `inputs`, in their order. At least as many as threads are worked on side by side, each by one
/// thread; fewer one after the other, each by as many threads as it asks for.
///
/// # Panics
/// If a task panics.
pub fn map<I: Send, O: Send>(inputs: Vec<I>, task: impl Fn(I) -> O + Sync) -> Vec<O> {
    if inputs.len() < count() {
        return inputs.into_iter().map(task).collect();
    }
    let mut slots: Vec<_> = inputs.into_iter().map(|input| (Some(input), None)).collect();
    for_each_chunk(&mut slots, 1, |_, slot| {
        let (input, output) = &mut slot[0];
        *output = input.take().map(&task);
    });
    slots.into_iter().filter_map(|(_, output)| output).collect()
}

/// [`for_each_chunk`] of a new vector of `len` elements. A chunk is cleared by the thread that is about to fill it.
///
/// # Panics
/// As [`for_each_chunk`].
pub fn new_chunks<T: Send + Copy + Default>(
    len: usize,
    size: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = Vec::<T>::with_capacity(len);
    let first = Start(out.as_mut_ptr());
    for_each(len.div_ceil(size), |index| {
        let len = size.min(len - index * size);
        // SAFETY: within the capacity. `for_each` calls with every index once, so that the chunks are disjoint, and a chunk
        // has values before it is a slice.
        let chunk = unsafe {
            let chunk = first.get().add(index * size);
            (0..len).for_each(|i| chunk.add(i).write(T::default()));
            std::slice::from_raw_parts_mut(chunk, len)
        };
        task(index, chunk);
    });
    // SAFETY: the capacity is that large, and all chunks together are all elements.
    unsafe { out.set_len(len) };
    out
}

/// [`for_each_block`] of a new matrix of `all_rows` rows. A block is cleared by the thread that is about to fill it.
///
/// # Panics
/// If `cuts` does not ascend, `rows` is 0, or a task panics.
pub fn new_blocks<T: Send + Copy + Default>(
    all_rows: usize,
    rows: usize,
    cuts: &[usize],
    task: impl Fn((usize, usize), Block<'_, T>) + Sync,
) -> Vec<T> {
    // SAFETY: all elements of a block are written before it is handed on.
    unsafe {
        allocated_blocks(all_rows, rows, cuts, |at, block: Block<'_, T>| {
            for row in 0..block.rows {
                let row = block.first.add(row * block.stride);
                (0..block.cols).for_each(|col| row.add(col).write(T::default()));
            }
            task(at, block);
        })
    }
}

/// As [`new_blocks`], for tasks that write each row of their block from its first to its last column: nothing is cleared.
///
/// # Panics
/// As there, and if a task leaves a part of a row unwritten.
pub fn written_blocks<T: Send + Copy>(
    all_rows: usize,
    rows: usize,
    cuts: &[usize],
    task: impl Fn((usize, usize), &mut Unwritten<'_, T>) + Sync,
) -> Vec<T> {
    // SAFETY: that a block is written is counted.
    unsafe {
        allocated_blocks(all_rows, rows, cuts, |at, block| {
            let mut block = Unwritten { written: vec![0; block.rows], block };
            task(at, &mut block);
            let Unwritten { written, block } = block;
            assert!(
                written.iter().all(|cols| *cols == block.cols),
                "{written:?} of {}",
                block.cols
            );
        })
    }
}

/// A new matrix of `all_rows` rows, made of its blocks.
///
/// # Safety
/// `task` does not read an element of its block before it has written it, and writes all of them.
unsafe fn allocated_blocks<T: Send>(
    all_rows: usize,
    rows: usize,
    cuts: &[usize],
    task: impl Fn((usize, usize), Block<'_, T>) + Sync,
) -> Vec<T> {
    let len = all_rows * cuts.last().copied().unwrap_or(0);
    let mut out = Vec::with_capacity(len);
    // SAFETY: the capacity is that large. All blocks together are all elements, and the caller's task writes them.
    unsafe {
        blocks(Start(out.as_mut_ptr()), all_rows, rows, cuts, task);
        out.set_len(len);
    }
    out
}

/// The blocks of the row-major matrix of `all_rows` rows that begins at `first`.
///
/// # Safety
/// The matrix is within one allocation that nobody else uses meanwhile. Its elements are values, or `task` makes them such
/// before it reads them.
unsafe fn blocks<T: Send>(
    first: Start<T>,
    all_rows: usize,
    rows: usize,
    cuts: &[usize],
    task: impl Fn((usize, usize), Block<'_, T>) + Sync,
) {
    assert!(cuts.is_sorted() && cuts.first().is_none_or(|first| *first == 0), "{cuts:?}");
    let (cols, across) = (cuts.last().copied().unwrap_or(0), cuts.len().saturating_sub(1));
    for_each(all_rows.div_ceil(rows) * across, |index| {
        let (row, j) = (index / across * rows, index % across);
        let block = Block {
            // SAFETY: row < all_rows and cuts[j] ≤ cols: within the matrix or, for an empty block, right behind it.
            first: unsafe { first.get().add(row * cols + cuts[j]) },
            stride: cols,
            rows: rows.min(all_rows - row),
            cols: cuts[j + 1] - cuts[j],
            elements: PhantomData,
        };
        task((row, j), block);
    });
}

/// Where a matrix begins whose blocks go to several threads.
struct Start<T>(*mut T);

// SAFETY: what is made of it are disjoint blocks and chunks, one for each index, and `for_each` calls with every index
// once; so each element is reached by one thread, and that is sending it.
unsafe impl<T: Send> Sync for Start<T> {}

impl<T> Start<T> {
    fn get(&self) -> *mut T {
        self.0 // a method, so that closures take all of `self` and not the pointer alone
    }

    /// # Safety
    /// `len` elements begin here, and no chunk is asked for twice.
    #[allow(clippy::mut_from_ref)] // the chunks are disjoint
    unsafe fn chunk(&self, index: usize, size: usize, len: usize) -> &mut [T] {
        let first = index * size;
        let size = size.min(len - first);
        // SAFETY: first + size ≤ len; the caller sees to it that nobody else has these elements.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), size) }
    }
}

/// A block of a row-major matrix: the same columns of some rows.
pub struct Block<'a, T> {
    first: *mut T,
    stride: usize,
    rows: usize,
    cols: usize,
    elements: PhantomData<&'a mut [T]>,
}

impl<T> Block<'_, T> {
    /// Rows of the block.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `row` of the block.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the block's elements are ours alone, and these are the ones of a row within it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }
}

/// A block whose rows are written from the left.
pub struct Unwritten<'a, T> {
    block: Block<'a, T>,
    /// Columns of each row.
    written: Vec<usize>,
}

impl<T: Copy> Unwritten<'_, T> {
    /// Rows of the block.
    pub fn rows(&self) -> usize {
        self.block.rows
    }

    /// Writes the next columns of a row, each made of an element of `from`.
    ///
    /// # Panics
    /// If there is no such row, or it has fewer columns left.
    #[inline(always)]
    pub fn extend<A>(&mut self, row: usize, from: &[A], value: impl Fn(&A) -> T) {
        let written = &mut self.written[row];
        let left = self.block.cols - *written;
        assert!(from.len() <= left, "{} values for {left} columns", from.len());
        // SAFETY: row < rows, so this is within the block.
        let to = unsafe { self.block.first.add(row * self.block.stride + *written) };
        // SAFETY: `from.len()` columns from `to` on are within the block, which is ours alone.
        let write = |(i, from)| unsafe { to.add(i).write(value(from)) };
        match <&[A; 16]>::try_from(from) {
            Ok(sixteen) => sixteen.iter().enumerate().for_each(write), // a store
            Err(_) => from.iter().enumerate().for_each(write),
        }
        *written += from.len();
    }
}
