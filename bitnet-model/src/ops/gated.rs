//! The gate of the feed-forward layer, `act(gate) · up`, in one pass and with a gradient.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{
    config::Activation,
    kernels::{Loop, vectorized},
    storage::{Rows, with_slice},
    threads,
};

/// `act(gate) · up`, element by element; f32, equal shapes. `act` is relu² (2B-4T) or SiLU (Llama).
pub fn gated(gate: &Tensor, up: &Tensor, act: Activation) -> Result<Tensor> {
    gate.apply_op2(up, Gated { act })
}

struct Gated {
    act: Activation,
}

fn check(gate: &Layout, up: &Layout) -> Result<()> {
    match gate.shape() == up.shape() {
        true => Ok(()),
        false => bail!("gated: gate {:?}, up {:?}", gate.shape(), up.shape()),
    }
}

impl Activation {
    /// The activation of one value.
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        match self {
            Self::Relu2 => relu(x) * relu(x),
            Self::Silu => x / (1. + (-x).exp()),
        }
    }

    /// Its derivative: `2·relu(x)`, or `σ(x)·(1 + x·(1 − σ(x)))`.
    #[inline(always)]
    fn derivative(self, x: f32) -> f32 {
        match self {
            Self::Relu2 => 2. * relu(x),
            Self::Silu => {
                let sigmoid = 1. / (1. + (-x).exp());
                sigmoid * (1. + x * (1. - sigmoid))
            }
        }
    }
}

/// `max(x, 0)`, but a NaN stays one.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0. { 0. } else { x }
}

/// Elements handled by one task.
const CHUNK: usize = 4096;

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        check(gate_layout, up_layout)?;
        let gate = Rows::<f32>::new(gate, gate_layout)?;
        let up = Rows::<f32>::new(up, up_layout)?;
        let (len, width) = (gate_layout.shape().elem_count(), gate.width());
        let parts = width.div_ceil(CHUNK).max(1); // of a row
        let cuts: Vec<usize> = (0..=parts).map(|part| part * width / parts).collect();
        let y = threads::new_blocks(
            len.checked_div(width).unwrap_or(0),
            (CHUNK / width.max(1)).max(1),
            &cuts,
            |(first, j), mut y| {
                let part = cuts[j]..cuts[j + 1];
                for i in 0..y.rows() {
                    let gate = &gate.row(first + i)[part.clone()];
                    let up = &up.row(first + i)[part.clone()];
                    vectorized(Forward { act: self.act, gate, up, y: y.row(i) });
                }
            },
        );
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gate: &CudaStorage,
        gate_layout: &Layout,
        up: &CudaStorage,
        up_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        check(gate_layout, up_layout)?;
        cuda::ops::gated(self.act, (gate, gate_layout), (up, up_layout))
    }

    crate::no_metal_fwd!(2);

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let [dgate, dup] = cuda::ops::gated_gradients(self.act, gate, up, dy)?;
            return Ok((Some(dgate), Some(dup)));
        }
        let (dgate, dup) = with_slice::<f32, _>(gate, |gate| {
            with_slice::<f32, _>(up, |up| {
                with_slice::<f32, _>(dy, |dy| {
                    let (mut dgate, mut dup) = (vec![0f32; dy.len()], vec![0f32; dy.len()]);
                    let pair = ((&mut dgate[..], CHUNK), (&mut dup[..], CHUNK));
                    threads::for_each_chunk_pair(pair.0, pair.1, |chunk, dgate, dup| {
                        let at = chunk * CHUNK..chunk * CHUNK + dgate.len();
                        let (gate, up, dy) = (&gate[at.clone()], &up[at.clone()], &dy[at]);
                        vectorized(Backward { act: self.act, gate, up, dy, dgate, dup });
                    });
                    Ok((dgate, dup))
                })
            })
        })?;
        let shape = gate.shape();
        Ok((
            Some(Tensor::from_vec(dgate, shape, gate.device())?),
            Some(Tensor::from_vec(dup, shape, gate.device())?),
        ))
    }
}

/// The values of some elements.
struct Forward<'a> {
    act: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Loop for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let all = self.y.iter_mut().zip(self.gate.iter().zip(self.up));
        // A loop for each activation: in a common one the compiler evaluates both, and the exponential costs.
        match self.act {
            Activation::Relu2 => {
                all.for_each(|(y, (g, up))| *y = Activation::Relu2.value(*g) * up);
            }
            Activation::Silu => {
                all.for_each(|(y, (g, up))| *y = Activation::Silu.value(*g) * up);
            }
        }
    }
}

/// The gradients of some elements.
struct Backward<'a> {
    act: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    dy: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Loop for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let inputs = self.gate.iter().zip(self.up).zip(self.dy);
        let all = inputs.zip(self.dgate.iter_mut().zip(self.dup));
        // A loop for each activation, as forward.
        match self.act {
            Activation::Relu2 => all.for_each(|(((&gate, up), dy), (dgate, dup))| {
                *dgate = dy * up * Activation::Relu2.derivative(gate);
                *dup = dy * Activation::Relu2.value(gate);
            }),
            Activation::Silu => all.for_each(|(((&gate, up), dy), (dgate, dup))| {
                *dgate = dy * up * Activation::Silu.derivative(gate);
                *dup = dy * Activation::Silu.value(gate);
            }),
        }
    }
}
