//! How a product is cut into tasks and blocks of the depth. Neither changes a bit: an output is one chain of fused products for
//! each block of the depth, the blocks added in order.

use std::ops::Range;

use super::{DEPTH, Operand, Panel, panels::Panels};
use crate::{
    kernels::{Loop, PanelProduct, vectorized},
    threads,
};

/// Rows whose panels a task of [`by_rows`] has in the second-level cache together: the right panels are then used often
/// enough.
const LEFT_ROWS: usize = 48;
/// Columns of a task of [`by_columns`], at least and at most: their panels and the sums of some hundred rows fit the
/// second-level cache.
const COLS: (usize, usize) = (64, 256);
/// Rows of a pass over the right factor: more would not make up for the room their sums take.
const ROWS: usize = 4096;
/// Rows whose panels stay in the second-level cache while a task's columns pass; whole panels of every width.
const GROUP: usize = 384;
/// Values of the left factor that are in panels together, which all tasks read.
const LEFT: usize = 4 << 20;
/// Tasks a thread should have, for all to finish together.
const TASKS: usize = 4;

/// The blocks of a part of the depth that begins with one.
fn blocks(depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    depth.clone().step_by(DEPTH).map(move |start| start..depth.end.min(start + DEPTH))
}

/// Values of a panel of `width` indices.
fn len<P: Panels>(depth: usize, width: usize) -> usize {
    depth.div_ceil(P::PAIR) * width
}

/// The panel that begins `from` behind the first of some indices.
fn pack<O: Operand, P: Panels>(
    panels: &P,
    operand: &O,
    (from, all): (usize, Range<usize>),
    (depth, width): (&Range<usize>, usize),
    out: &mut [P::Value],
) {
    let first = all.start + from;
    let panel = Panel { indices: first..all.end.min(first + width), depth: depth.clone(), width };
    vectorized(Pack { panels, operand, panel, out });
}

struct Pack<'a, O, P: Panels> {
    panels: &'a P,
    operand: &'a O,
    panel: Panel,
    out: &'a mut [P::Value],
}

impl<O: Operand, P: Panels> Loop for Pack<'_, O, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.operand.pack(self.panels, self.panel, self.out);
    }
}

/// Tasks have rows, and the panels of the right factor in common: for results that are at least as high as wide.
pub(super) fn by_rows<A: Operand, B: Operand, P: Panels>(
    shape: PanelProduct,
    (a, b): (A, B),
    panels: &P,
    out: &mut [f32],
) {
    let PanelProduct { cols, depth, .. } = shape;
    let (widths, threads) = (panels.widths(), threads::count());
    let right_panels = cols.div_ceil(widths.cols);
    let mut right =
        vec![P::Value::default(); right_panels * len::<P>(DEPTH.min(depth), widths.cols)];
    let group_rows = LEFT_ROWS.next_multiple_of(widths.rows);
    let groups = shape.rows.div_ceil(group_rows);
    let task_rows = match groups.div_ceil(threads * TASKS) {
        // Few rows: equal parts, whole panels each.
        0 | 1 => shape.rows.div_ceil(threads).max(1).next_multiple_of(widths.rows),
        groups => groups * group_rows,
    };
    for block in blocks(0..depth) {
        let panel_len = len::<P>(block.len(), widths.cols);
        let right = &mut right[..right_panels * panel_len];
        threads::for_each_chunk(right, panel_len, |panel, out| {
            pack(panels, &b, (panel * widths.cols, 0..cols), (&block, widths.cols), out);
        });
        let right = &*right;
        threads::for_each_chunk(out, task_rows * cols, |task, out| {
            let panel_len = len::<P>(block.len(), widths.rows);
            let mut left = vec![P::Value::default(); group_rows / widths.rows * panel_len];
            for (group, out) in out.chunks_mut(group_rows * cols).enumerate() {
                let (first, rows) = (task * task_rows + group * group_rows, out.len() / cols);
                let left = &mut left[..rows.div_ceil(widths.rows) * panel_len];
                for (panel, out) in left.chunks_exact_mut(panel_len).enumerate() {
                    let indices = first..first + rows;
                    pack(panels, &a, (panel * widths.rows, indices), (&block, widths.rows), out);
                }
                let add = shape.add || block.start > 0;
                let depth = block.len().div_ceil(P::PAIR);
                panels.multiply(left, right, PanelProduct { rows, depth, add, ..shape }, out);
            }
        });
    }
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
    let PanelProduct { cols, depth, .. } = shape;
    let (widths, threads) = (panels.widths(), threads::count());
    let width = (cols / (threads * TASKS)).clamp(COLS.0, COLS.1).next_multiple_of(widths.cols);
    let cuts: Vec<usize> = (0..cols).step_by(width).chain([cols]).collect();
    // Few columns: tasks have some of the rows each.
    let parts = (2 * threads).div_ceil(cuts.len() - 1);
    for (chunk, out) in out.chunks_mut(ROWS * cols).enumerate() {
        let (first_row, rows) = (chunk * ROWS, out.len() / cols);
        let task_rows = rows.div_ceil(parts).next_multiple_of(widths.rows);
        let left_len = rows.div_ceil(widths.rows) * len::<P>(DEPTH, widths.rows);
        let span_len = (LEFT / left_len).max(1) * DEPTH;
        for start in (0..depth).step_by(span_len) {
            let span = start..depth.min(start + span_len);
            let mut left = vec![P::Value::default(); span.len().div_ceil(DEPTH) * left_len];
            for (block, left) in blocks(span.clone()).zip(left.chunks_mut(left_len)) {
                let panel_len = len::<P>(block.len(), widths.rows);
                let left = &mut left[..rows.div_ceil(widths.rows) * panel_len];
                let indices = first_row..first_row + rows;
                threads::for_each_chunk(left, panel_len, |panel, out| {
                    let at = (panel * widths.rows, indices.clone());
                    pack(panels, &a, at, (&block, widths.rows), out);
                });
            }
            threads::for_each_block(out, task_rows, &cuts, |(row, j), mut out| {
                let (rows, cols) = (out.rows(), cuts[j + 1] - cuts[j]);
                let mut sums = vec![0f32; rows * cols];
                let add = shape.add || start > 0;
                if add {
                    sums.chunks_mut(cols).enumerate().for_each(|(r, sums)| {
                        sums.copy_from_slice(out.row(r));
                    });
                }
                let most = len::<P>(DEPTH.min(span.len()), widths.cols);
                let mut right = vec![P::Value::default(); cols.div_ceil(widths.cols) * most];
                for (block, left) in blocks(span.clone()).zip(left.chunks(left_len)) {
                    let panel_len = len::<P>(block.len(), widths.cols);
                    let right = &mut right[..cols.div_ceil(widths.cols) * panel_len];
                    for (panel, out) in right.chunks_mut(panel_len).enumerate() {
                        let at = (panel * widths.cols, cuts[j]..cuts[j] + cols);
                        pack(panels, &b, at, (&block, widths.cols), out);
                    }
                    let left_panel = len::<P>(block.len(), widths.rows);
                    let left = &left[row / widths.rows * left_panel..];
                    let group = left_panel * (GROUP / widths.rows);
                    let (depth, add) = (block.len().div_ceil(P::PAIR), add || block.start > start);
                    for (left, sums) in left.chunks(group).zip(sums.chunks_mut(GROUP * cols)) {
                        let rows = sums.len() / cols;
                        let product = PanelProduct { rows, cols, depth, add, ..shape };
                        panels.multiply(left, right, product, sums);
                    }
                }
                for (r, sums) in sums.chunks(cols).enumerate() {
                    out.row(r).copy_from_slice(sums);
                }
            });
        }
    }
}
