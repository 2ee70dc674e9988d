//! How a product is cut into tasks and blocks of the depth. Neither changes a bit: an output is one chain of fused products for
//! each block of the depth, the blocks added in order.

use std::ops::Range;

use super::{Operand, Part, panels::Panels, scratch::scratch};
use crate::{
    kernels::{Loop, Order, PANEL_DEPTH as DEPTH, PanelProduct, vectorized},
    threads::{self, Block},
};

/// Rows of a task of [`by_rows`], at most: their panels stay in the second-level cache, and are enough to use the right ones
/// often.
const LEFT_ROWS: usize = 48;
/// Right panels that a thread makes together, from whole cache lines even of bytes.
const RIGHT_PANELS: usize = 2;
/// Columns of a task of [`by_columns`], at least and at most: their panels and the sums of some hundred rows fit the
/// second-level cache.
const COLS: (usize, usize) = (64, 256);
/// Rows of a pass over the right factor: more would not make up for the room their sums take.
const ROWS: usize = 4096;
/// Rows whose panels stay in the second-level cache while a task's columns pass; whole panels of every width.
const GROUP: usize = 384;
/// Values of the left factor that are in panels together, which all tasks read.
const LEFT: usize = 4 << 20;
/// Tasks of [`by_columns`] that a thread should have, for all to finish together.
const TASKS: usize = 4;

/// The blocks of a part of the depth that begins with one.
fn blocks(depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    depth.clone().step_by(DEPTH).map(move |start| start..depth.end.min(start + DEPTH))
}

/// Brings a part of a factor into panels.
fn pack<O: Operand, P: Panels>(panels: &P, operand: &O, part: Part, out: &mut [P::Value]) {
    vectorized(Pack { panels, operand, part, out });
}

struct Pack<'a, O, P: Panels> {
    panels: &'a P,
    operand: &'a O,
    part: Part,
    out: &'a mut [P::Value],
}

impl<O: Operand, P: Panels> Loop for Pack<'_, O, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.operand.pack(self.panels, &self.part, self.out);
    }
}

/// Tasks have rows, and the panels of the right factor in common: for results that are at least as high as wide.
pub(super) fn by_rows<A: Operand, B: Operand, P: Panels>(
    shape: PanelProduct,
    (a, b): (A, B),
    panels: &P,
    out: &mut [f32],
) {
    let PanelProduct { cols, depth, order, .. } = shape;
    let (widths, threads) = (panels.widths(), threads::count());
    let right_panels = cols.div_ceil(widths.cols);
    // Equal parts, as many for each thread, of whole panels.
    let tasks = shape.rows.div_ceil(threads * LEFT_ROWS) * threads;
    let task_rows = shape.rows.div_ceil(tasks).next_multiple_of(widths.rows);
    let most = DEPTH.min(depth).div_ceil(P::PAIR);
    scratch(right_panels * widths.cols * most, |right: &mut [P::Value]| {
        for block in blocks(0..depth) {
            let values = block.len().div_ceil(P::PAIR);
            let panel_len = values * widths.cols;
            let right = &mut right[..right_panels * panel_len];
            threads::for_each_chunk(right, RIGHT_PANELS * panel_len, |task, out| {
                let first = task * RIGHT_PANELS * widths.cols;
                let indices = first..cols.min(first + RIGHT_PANELS * widths.cols);
                let (depth, width) = (block.clone(), widths.cols);
                pack(panels, &b, Part { indices, depth, width, order: Order::Depths }, out);
            });
            let right = &*right;
            threads::for_each_chunk(out, task_rows * cols, |task, out| {
                let (first, rows) = (task * task_rows, out.len() / cols);
                let panel_len = widths.left_len(order, values);
                scratch(rows.div_ceil(widths.rows) * panel_len, |left: &mut [P::Value]| {
                    let (indices, depth) = (first..first + rows, block.clone());
                    pack(panels, &a, Part { indices, depth, width: widths.rows, order }, left);
                    let add = shape.add || block.start > 0;
                    let product = PanelProduct { rows, depth: values, add, ..shape };
                    panels.multiply(left, right, product, out);
                });
            });
        }
    });
}

/// Tasks have columns, and the panels of the left factor in common: for results that are wider than high. A task brings its
/// columns into panels block of the depth by block, multiplies them, and keeps the sums, so that none of it leaves the caches of
/// its thread.
pub(super) fn by_columns<A: Operand, B: Operand, P: Panels>(
    shape: PanelProduct,
    (a, b): (A, B),
    panels: &P,
    out: &mut [f32],
) {
    let PanelProduct { cols, depth, order, .. } = shape;
    let (widths, threads) = (panels.widths(), threads::count());
    let width = (cols / (threads * TASKS)).clamp(COLS.0, COLS.1).next_multiple_of(widths.cols);
    let cuts: Vec<usize> = (0..cols).step_by(width).chain([cols]).collect();
    // Few columns: tasks have some of the rows each.
    let parts = (2 * threads).div_ceil(cuts.len() - 1);
    let most = DEPTH.min(depth).div_ceil(P::PAIR);
    for (chunk, out) in out.chunks_mut(ROWS * cols).enumerate() {
        let (first_row, rows) = (chunk * ROWS, out.len() / cols);
        let task_rows = rows.div_ceil(parts).next_multiple_of(widths.rows);
        let left_panels = rows.div_ceil(widths.rows);
        let left_len = left_panels * widths.left_len(order, most);
        let blocks_of_span = (LEFT / left_len).clamp(1, depth.div_ceil(DEPTH));
        for start in (0..depth).step_by(blocks_of_span * DEPTH) {
            let span = start..depth.min(start + blocks_of_span * DEPTH);
            scratch(span.len().div_ceil(DEPTH) * left_len, |left: &mut [P::Value]| {
                for (block, left) in blocks(span.clone()).zip(left.chunks_mut(left_len)) {
                    let panel_len = widths.left_len(order, block.len().div_ceil(P::PAIR));
                    let left = &mut left[..left_panels * panel_len];
                    let group = LEFT_ROWS / widths.rows;
                    threads::for_each_chunk(left, group * panel_len, |task, out| {
                        let first = first_row + task * group * widths.rows;
                        let indices = first..(first_row + rows).min(first + group * widths.rows);
                        let (depth, width) = (block.clone(), widths.rows);
                        pack(panels, &a, Part { indices, depth, width, order }, out);
                    });
                }
                let (left, add) = (&*left, shape.add || start > 0);
                threads::for_each_block(out, task_rows, &cuts, |(row, j), out| {
                    let task =
                        ColumnTask { shape: PanelProduct { add, ..shape }, panels, left, left_len };
                    task.run(&b, span.clone(), (row, cuts[j]..cuts[j + 1]), out);
                });
            });
        }
    }
}

/// What tasks of some columns have in common.
struct ColumnTask<'a, P: Panels> {
    shape: PanelProduct,
    panels: &'a P,
    /// Panels of the left factor, block of the depth after block.
    left: &'a [P::Value],
    left_len: usize,
}

impl<P: Panels> ColumnTask<'_, P> {
    /// A block of the result, which begins at a row.
    fn run<B: Operand>(
        &self,
        b: &B,
        span: Range<usize>,
        (row, columns): (usize, Range<usize>),
        mut out: Block<'_, f32>,
    ) {
        let PanelProduct { add, order, .. } = self.shape;
        let (panels, widths) = (self.panels, self.panels.widths());
        let (rows, cols) = (out.rows(), columns.len());
        let right_panels = cols.div_ceil(widths.cols);
        let most = DEPTH.min(span.len()).div_ceil(P::PAIR);
        scratch(rows * cols, |sums: &mut [f32]| {
            if add {
                sums.chunks_mut(cols).enumerate().for_each(|(r, sums)| {
                    sums.copy_from_slice(out.row(r));
                });
            }
            scratch(right_panels * widths.cols * most, |right: &mut [P::Value]| {
                for (block, left) in blocks(span.clone()).zip(self.left.chunks(self.left_len)) {
                    let values = block.len().div_ceil(P::PAIR);
                    let right = &mut right[..right_panels * widths.cols * values];
                    let (indices, width) = (columns.clone(), widths.cols);
                    let part = Part { indices, depth: block.clone(), width, order: Order::Depths };
                    pack(panels, b, part, right);
                    let left_panel = widths.left_len(order, values);
                    let left = &left[row / widths.rows * left_panel..];
                    let group = left_panel * (GROUP / widths.rows);
                    let add = add || block.start > span.start;
                    for (left, sums) in left.chunks(group).zip(sums.chunks_mut(GROUP * cols)) {
                        let rows = sums.len() / cols;
                        let shape = PanelProduct { rows, cols, depth: values, add, ..self.shape };
                        panels.multiply(left, right, shape, sums);
                    }
                }
            });
            for (r, sums) in sums.chunks(cols).enumerate() {
                out.row(r).copy_from_slice(sums);
            }
        });
    }
}
