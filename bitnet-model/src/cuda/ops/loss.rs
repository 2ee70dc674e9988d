//! Output head and cross-entropy in one, a slice of the tokens at a time, with the gradients of both.

use candle_core::{
    CudaStorage, Layout, Result, Tensor, backend::BackendStorage,
    cuda_backend::cudarc::driver::CudaSlice,
};

use super::{
    gradients::{dense_rows, tensor},
    vocabulary::DenseMatrix,
};
use crate::cuda::{
    device::{Gathered, Memory, launch, uninitialized},
    launch::{Address, Element, Factor, GemmShape, Launch, Right},
};

/// What a loss over an output head is of.
#[derive(Clone, Copy, Debug)]
pub struct HeadLossOf<'a> {
    /// Rows of the hidden states, and of each its target, which the head has.
    pub rows: &'a [u32],
    /// As many.
    pub targets: &'a [u32],
    /// Divides the sum.
    pub items: usize,
    /// Rows of a slice, at least one.
    pub slice: usize,
    /// Whether products round their factors to bfloat16.
    pub bf16: bool,
    /// Whether the head's gradient is wanted.
    pub trains_weight: bool,
}

/// The loss, the gradient of the hidden states, and that of the head.
pub type HeadLoss = (f32, Tensor, Option<Tensor>);

/// The cross-entropy of `hidden` (…, k) under the head `weight` (vocab, k). Three numbers a row come to the processor, whose
/// logarithm it is.
pub fn head_loss(
    (hidden, layout): (&CudaStorage, &Layout),
    (weight, weight_layout): (&CudaStorage, &Layout),
    of: HeadLossOf<'_>,
) -> Result<HeadLoss> {
    let (vocab, k) = weight_layout.shape().dims2()?;
    let device = hidden.device();
    let stream = device.cuda_stream();
    let count = layout.shape().elem_count();
    let hidden = Gathered::<f32>::contiguous(hidden, layout)?;
    let head_matrix = DenseMatrix::new("head-loss", weight, weight_layout)?;
    let right = head_matrix.right();
    let size = of.slice.min(of.rows.len()).max(1);
    let mut x = uninitialized::<f32>(device, size * k)?;
    let mut dx = uninitialized::<f32>(device, size * k)?;
    let mut logits = uninitialized::<f32>(device, size * vocab)?;
    let mut sums = uninitialized::<f32>(device, 3 * size)?;
    let mut dhidden = device.alloc_zeros::<f32>(count.max(1))?;
    let weights = if of.trains_weight { vocab * k } else { 0 };
    let mut dweight = device.alloc_zeros::<f32>(weights.max(1))?;
    let mut nats = 0f64;
    for (rows, targets) in of.rows.chunks(size).zip(of.targets.chunks(size)) {
        let count = rows.len();
        let (row_ids, target_ids) = (device.clone_htod(rows)?, device.clone_htod(targets)?);
        let products = Products { bf16: of.bf16, shape: (count, vocab, k) };
        {
            let (hidden, head) = (hidden.memory(&stream)?, head_matrix.memory(&stream)?);
            let (row_ids, target_ids) =
                (Memory::read(&row_ids, 0, &stream), Memory::read(&target_ids, 0, &stream));
            let x = Memory::written(&mut x, &stream);
            let logits = Memory::written(&mut logits, &stream);
            let sums = Memory::written(&mut sums, &stream);
            let from = (hidden.address, layout.shape().elem_count() / k.max(1), k);
            let ids = (row_ids.address, count);
            let gather = Launch::gather_rows(Element::F32, ids, from, x.address);
            let forward = products.logits(x.address, (right, head.address), logits.address);
            let rows = dense_rows(logits.address, count, vocab);
            let sum = Launch::exponential_sums(rows, target_ids.address, sums.address);
            for step in [gather, forward, sum] {
                // SAFETY: all buffers have the sizes that `Launch` documents, and are held.
                unsafe { launch(device, &step) }?;
            }
        }
        let (log_sums, slice_nats) = log_sums(&device.clone_dtoh(&sums)?[..3 * count]);
        nats += slice_nats;
        let log_sums: CudaSlice<f32> = device.clone_htod(&log_sums)?;
        let head = head_matrix.memory(&stream)?;
        let (row_ids, target_ids) =
            (Memory::read(&row_ids, 0, &stream), Memory::read(&target_ids, 0, &stream));
        let (x, log_sums) = (Memory::read(&x, 0, &stream), Memory::read(&log_sums, 0, &stream));
        let (logits, dx) =
            (Memory::written(&mut logits, &stream), Memory::written(&mut dx, &stream));
        let dhidden = Memory::written(&mut dhidden, &stream);
        let dweight = Memory::written(&mut dweight, &stream);
        let scale = 1. / of.items as f32;
        let all = dense_rows(logits.address, count, vocab);
        let gradient =
            Launch::softmax_minus_onehot(all, target_ids.address, log_sums.address, scale);
        let of_x = products.input(logits.address, (right, head.address), dx.address);
        let slice = dense_rows(dx.address, count, k);
        let scatter = Launch::scatter_rows(row_ids.address, slice, dhidden.address);
        let of_weight = products.weight(logits.address, x.address, dweight.address);
        let steps =
            [gradient, of_x, scatter].into_iter().chain(of.trains_weight.then_some(of_weight));
        for step in steps {
            // SAFETY: as above.
            unsafe { launch(device, &step) }?;
        }
    }
    let loss = (nats / of.items as f64) as f32;
    let dweight = of.trains_weight.then(|| tensor(dweight, device, weight_layout.shape()));
    Ok((loss, tensor(dhidden, device, layout.shape()), dweight))
}

/// `log Σ exp(logit)` of each row, and the sum of their cross-entropies, of (largest, Σ exp(logit − largest), target's logit).
fn log_sums(rows: &[f32]) -> (Vec<f32>, f64) {
    let rows = rows.as_chunks::<3>().0;
    let log_sums = rows.iter().map(|[max, sum, _]| (f64::from(*max) + f64::from(*sum).ln()) as f32);
    let log_sums = Vec::from_iter(log_sums);
    let nats = rows.iter().zip(&log_sums).map(|([_, _, target], log)| f64::from(log - target));
    let nats = nats.sum();
    (log_sums, nats)
}

/// The three products of a slice.
struct Products {
    bf16: bool,
    /// Rows, vocab and k.
    shape: (usize, usize, usize),
}

impl Products {
    fn launch(
        &self,
        shape: (usize, usize, usize),
        add: bool,
        (a, (right, b)): (Factor, (Right, Factor)),
        out: Address,
    ) -> Launch {
        Launch::gemm((a, 0), (right, b), GemmShape::new(shape, add, self.bf16), 1, out)
    }

    /// x·Wᵀ.
    fn logits(&self, x: Address, (right, w): (Right, Address), out: Address) -> Launch {
        let (_, _, k) = self.shape;
        let factors = (Factor::depth_inner(k, x), (right, Factor::depth_inner(k, w)));
        self.launch(self.shape, false, factors, out)
    }

    /// dlogits·W.
    fn input(&self, dlogits: Address, (right, w): (Right, Address), out: Address) -> Launch {
        let (count, vocab, k) = self.shape;
        let factors = (Factor::depth_inner(vocab, dlogits), (right, Factor::index_inner(k, w)));
        self.launch((count, k, vocab), false, factors, out)
    }

    /// dlogitsᵀ·x, added.
    fn weight(&self, dlogits: Address, x: Address, out: Address) -> Launch {
        let (count, vocab, k) = self.shape;
        let b = (Right::F32, Factor::index_inner(k, x));
        self.launch((vocab, k, count), true, (Factor::index_inner(vocab, dlogits), b), out)
    }
}
