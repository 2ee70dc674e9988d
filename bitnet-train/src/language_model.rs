//! A language model's forward and backward pass, block by block.
//!
//! Candle records one graph from the parameters to the loss and keeps all of it until the end. Here every block is a graph
//! of its own, between a variable that holds its input and its output: backward runs through one block at a time, whose
//! activations are then free and whose gradients are complete. With `recompute` even the graphs of the forward pass are
//! not kept: only the inputs of the blocks are, and each block is computed again when backward comes to it
//! (arXiv:1604.06174). Either way gives the same bits.

use std::sync::Arc;

use bitnet_model::{
    config::PROJECTIONS, model::Model, nn::Context, ops::gemm::Precision, quant::WeightQuantizer,
};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendStorage};

use crate::{
    Error, Result,
    batch::Batch,
    codes::codes,
    lora::Step,
    loss::{IGNORED, predictions},
    objective::{Objective, Output, Term},
    samples::{Prompts, Sample},
    task::{Gradients, Part, Prediction, Task},
};

/// A model that is trained.
pub struct LanguageModel {
    model: Model,
    frozen: Arc<Model>,
    objective: Box<dyn Objective>,
    backward: Precision,
    recompute: bool,
    quantizer: Option<WeightQuantizer>,
    noise: Option<EmbeddingNoise>,
    prompts: Option<Prompts>,
}

/// NEFTune (arXiv:2310.05914): what is added to the embedded tokens of a training step, uniform within
/// `±alpha/√(sequence length · hidden size)`.
#[derive(Clone, Debug)]
pub struct EmbeddingNoise {
    /// Its size; 5 to 15 in the paper.
    pub alpha: f64,
    /// The step it follows.
    pub step: Step,
}

impl EmbeddingNoise {
    fn add_to(&self, embedded: Tensor) -> Result<Tensor> {
        let (_, seq, hidden_size) = embedded.dims3()?;
        let Some(stream) = self.step.stream("embedding") else { return Ok(embedded) };
        let size = (self.alpha / ((seq * hidden_size) as f64).sqrt()) as f32;
        let mut noise = vec![0f32; embedded.elem_count()];
        stream.add_uniform(size, hidden_size, &mut noise);
        Ok((&embedded + Tensor::from_vec(noise, embedded.shape(), embedded.device())?)?)
    }
}

impl LanguageModel {
    /// `model` is loaded from the variables that are trained, `frozen` shares their memory and records nothing.
    pub fn new(model: Model, frozen: Model, objective: Box<dyn Objective>) -> Self {
        let frozen = Arc::new(frozen);
        let (backward, recompute) = (Precision::F32, false);
        let (quantizer, noise, prompts) = (None, None, None);
        Self { model, frozen, objective, backward, recompute, quantizer, noise, prompts }
    }

    /// In which precision attention's gradients are multiplied: single without this.
    pub fn backward(self, backward: Precision) -> Self {
        Self { backward, ..self }
    }

    /// Whether blocks are computed again in the backward pass, which takes a third more time and saves most of the
    /// activations' memory.
    pub fn recompute(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    /// How the projections' weights are quantized, for the census of the codes; not at all without this.
    pub fn quantizer(self, quantizer: Option<WeightQuantizer>) -> Self {
        Self { quantizer, ..self }
    }

    /// With noise on the embedded tokens of training steps.
    pub fn noise(self, noise: Option<EmbeddingNoise>) -> Self {
        Self { noise, ..self }
    }

    /// With prompts that the model is asked at evaluations.
    pub fn prompts(self, prompts: Option<Prompts>) -> Self {
        Self { prompts, ..self }
    }
}

impl Task for LanguageModel {
    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        self.objective.prepare(batch)?;
        let tokens = tokens(batch, &self.model)?;
        let angles = self.model.document_angles(&tokens, &batch.starts)?;
        let context = || Context::Own { starts: &batch.starts, backward: self.backward };
        let embedded = self.model.embed(&tokens)?;
        let mut inputs: Vec<(Input, Option<Tensor>)> = Vec::new();
        let mut x = embedded.detach();
        if let Some(noise) = &self.noise {
            x = noise.add_to(x)?;
        }
        let blocks = self.model.blocks().iter().zip(self.frozen.blocks());
        for (block, frozen) in blocks {
            let input = match inputs.is_empty() && !embedded.track_op() {
                true => Input::Constant(x.clone()),
                false => Input::Variable(Var::from_tensor(&x)?),
            };
            let output = match self.recompute {
                true => {
                    x = frozen.forward(&x, &angles, context())?;
                    None
                }
                false => {
                    let output = block.forward(input.tensor(), &angles, context())?;
                    x = output.detach();
                    Some(output)
                }
            };
            inputs.push((input, output));
        }
        let last = Input::Variable(Var::from_tensor(&x)?);
        drop(x);
        let hidden = self.model.norm(last.tensor())?;
        let output = Output { model: &self.model, hidden: &hidden, batch, items };
        let mut parts = Vec::new();
        let loss = total(self.objective.of_output(output)?, None, &mut parts)?;
        drop(hidden);
        let mut dy = backward(loss, &last, gradients)?;
        drop(last);
        for (layer, (input, output)) in inputs.into_iter().enumerate().rev() {
            let output = match output {
                Some(output) => output,
                None => self.model.blocks()[layer].forward(input.tensor(), &angles, context())?,
            };
            let Some(upstream) = dy else { break };
            let through = output.apply_op1(Seed { dy: upstream })?;
            drop(output);
            let terms = self.objective.of_block(layer, batch, items)?;
            let loss = total(terms, Some(through), &mut parts)?;
            dy = backward(loss, &input, gradients)?;
        }
        if let Some(dy) = dy {
            gradients.collect(&mut embedded.apply_op1(Seed { dy })?.backward()?)?;
        }
        Ok(parts)
    }

    fn codes(&self, name: &str, latent: &[f32]) -> Option<Vec<i8>> {
        let module = name.strip_suffix(".weight")?;
        let is_projection = PROJECTIONS.contains(&module.rsplit('.').next()?);
        self.quantizer.filter(|_| is_projection).map(|quantizer| codes(latent, quantizer))
    }

    /// Of a large vocabulary there is never a logit for every token at once.
    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        /// Logits at a time: 64 MiB.
        const LOGITS: usize = 16 << 20;
        let tokens = tokens(batch, &self.frozen)?;
        let states = self.frozen.document_states(&tokens, &batch.starts)?.flatten_to(1)?;
        let counts = |(row, label): (usize, &i64)| (*label != IGNORED).then_some(row as u32);
        let rows: Vec<u32> = batch.labels.iter().enumerate().filter_map(counts).collect();
        let size = (LOGITS / self.frozen.config().vocab_size.max(1)).max(1);
        let mut all = Vec::with_capacity(rows.len());
        for rows in rows.chunks(size) {
            let labels: Vec<i64> = rows.iter().map(|&row| batch.labels[row as usize]).collect();
            let rows = Tensor::from_slice(rows, rows.len(), states.device())?;
            let logits = self.frozen.logits(&states.index_select(&rows, 0)?)?;
            all.extend(predictions(&logits, &labels)?);
        }
        Ok(all)
    }

    fn samples(&self) -> Result<Vec<Sample>> {
        self.prompts.as_ref().map_or(Ok(Vec::new()), |prompts| prompts.answers(&self.frozen))
    }
}

/// What a block is computed from.
enum Input {
    /// Its gradient is wanted.
    Variable(Var),
    /// Nothing before it is trained.
    Constant(Tensor),
}

impl Input {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Variable(var) => var,
            Self::Constant(tensor) => tensor,
        }
    }
}

fn tokens(batch: &Batch, model: &Model) -> Result<Tensor> {
    let shape = (batch.rows(), batch.sequence_length);
    Ok(Tensor::from_slice(&batch.inputs, shape, model.device())?)
}

/// `seed + Σ weight·value`, and the terms' values.
fn total(terms: Vec<Term>, seed: Option<Tensor>, parts: &mut Vec<Part>) -> Result<Tensor> {
    let mut total = seed;
    for Term { name, value, weight } in terms {
        parts.push(Part { name, value: f64::from(value.to_scalar::<f32>()?), weight });
        let weighted = if weight == 1. { value } else { (value * weight)? };
        total = Some(match total {
            Some(total) => (total + weighted)?,
            None => weighted,
        });
    }
    total.ok_or_else(|| Error::Input("an objective without a term".into()))
}

/// Collects the parameters' gradients of `loss` and returns that of `input`, if it is a variable.
fn backward(loss: Tensor, input: &Input, gradients: &mut Gradients) -> Result<Option<Tensor>> {
    let mut store = loss.backward()?;
    drop(loss);
    let dy = match input {
        Input::Variable(var) => {
            let missing = || Error::NoGradient { name: "block input".into() };
            Some(store.remove(var).ok_or_else(missing)?)
        }
        Input::Constant(_) => None,
    };
    gradients.collect(&mut store)?;
    Ok(dy)
}

/// Stands for the rest of a loss whose gradient with respect to `x` is `dy`: forward 0, backward `dy`.
struct Seed {
    dy: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let zero = x.device().alloc_zeros::<f32>(1)?;
        Ok((CudaStorage::wrap_cuda_slice(zero, x.device().clone()), Shape::from(())))
    }

    bitnet_model::no_metal_fwd!(1);

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.dy.clone()))
    }
}

#[cfg(test)]
mod tests {
    use bitnet_model::{
        config::{Activation, Config, Family},
        quant::Rounding,
    };
    use candle_core::D;

    use super::*;
    use crate::{
        loss::{cross_entropy, shift_labels},
        objective::NextToken,
        parameters::Parameters,
        qat::QatLinears,
    };

    const TOKENS: [u32; 14] = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7];

    fn config(tie_word_embeddings: bool) -> Config {
        Config {
            family: Family::BitNet,
            vocab_size: 32,
            hidden_size: 16,
            intermediate_size: 24,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 4,
            hidden_act: Activation::Relu2,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            max_position_embeddings: 16,
            tie_word_embeddings,
            attention_bias: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            quantization: None,
        }
    }

    fn values(gradients: &[Tensor]) -> Vec<f32> {
        gradients.iter().flat_map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
    }

    #[test]
    fn blocks_and_recomputed_blocks_give_the_gradients_of_one_graph() {
        let qat = QatLinears::new(Rounding::HalfEven);
        let batch = Batch {
            inputs: TOKENS.to_vec(),
            labels: shift_labels(&TOKENS, 7),
            starts: Vec::new(),
            sequence_length: 7,
        };
        for tied in [true, false] {
            let parameters = Parameters::new(5);
            let load = |vb| Model::load(&config(tied), &qat, vb).unwrap();
            let model = load(parameters.var_builder());
            let named = parameters.named();

            let tokens = tokens(&batch, &model).unwrap();
            let hidden = model.hidden_states(&tokens, None).unwrap();
            let logits = model.logits(&hidden).unwrap().flatten_to(D::Minus2).unwrap();
            let loss = cross_entropy(&logits, &batch.labels, None).unwrap();
            let mut whole = Gradients::new(&named);
            whole.collect(&mut loss.backward().unwrap()).unwrap();
            let whole = values(&whole.finish().unwrap());

            let [kept, recomputed] = [false, true].map(|recompute| {
                let [model, frozen] =
                    [parameters.var_builder(), parameters.frozen_builder()].map(load);
                let task = LanguageModel::new(model, frozen, Box::new(NextToken::default()))
                    .recompute(recompute);
                let mut gradients = Gradients::new(&named);
                let parts = task.pass(&batch, batch.items(), &mut gradients).unwrap();
                assert_eq!(parts.len(), 1);
                assert_eq!(parts[0].value as f32, loss.to_scalar::<f32>().unwrap());
                let nats: f32 = task.evaluate(&batch).unwrap().iter().map(|p| p.nats).sum();
                assert!((nats / 12. - loss.to_scalar::<f32>().unwrap()).abs() < 1e-6);
                values(&gradients.finish().unwrap())
            });
            assert!(kept == recomputed, "recomputed blocks gave other gradients");
            // Candle adds up the gradients of q, k and v in another order: a few roundings.
            let largest = whole.iter().fold(0f32, |most, g| most.max(g.abs()));
            let off = whole.iter().zip(&kept).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(off < 1e-5 * largest, "{off:e} of {largest:e}");
        }
    }
}
