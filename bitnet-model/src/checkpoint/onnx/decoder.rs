//! The graph of a causal language model, as [`Model`](crate::model::Model) computes it, with the inputs and outputs that
//! Hugging Face's optimum gives decoders.
//!
//! Everything is f32 but the products of projections: their inputs are integers, exact in every sum. Shapes in comments
//! have `past` tokens of the cache and `all` = past + seq.

use std::collections::HashMap;

use super::{
    graph::{Attribute, Dim, ElementType, Graph, MICROSOFT},
    layout::{self, BLOCK, BLOCK_WEIGHTS, OnnxWeights, TOP},
};
use crate::{
    config::{Activation, Config, Quantization, inverse_frequencies},
    quant::Rounding,
};

const BATCH: Dim = Dim::Named("batch_size");
const SEQ: Dim = Dim::Named("sequence_length");
const PAST: Dim = Dim::Named("past_sequence_length");
const ALL: Dim = Dim::Named("past_sequence_length + sequence_length");

/// What the graph is made of, besides the tensors in the other file, which have the Hub's names.
pub(super) struct Decoder<'a> {
    pub config: &'a Config,
    pub quantization: Quantization,
    pub weights: OnnxWeights,
    /// Shape and scale of each, by its name.
    pub projections: &'a HashMap<String, Projection>,
}

/// What the graph needs to know of a projection's weights.
pub(super) struct Projection {
    /// (out_features, in_features)
    pub shape: (usize, usize),
    /// It multiplies.
    pub scale: f32,
}

/// Values that all layers share.
struct Shared {
    /// (batch, 1, seq, head_dim / 2)
    cos: String,
    sin: String,
    /// 0, or the smallest f32 where a token does not look: (batch, 1, heads / kv_heads · seq, all)
    mask: String,
}

/// Activations as `MatMulInteger` or `MatMulNBits` takes them.
struct Codes {
    codes: String,
    /// What multiplied the activations, (batch, seq, 1).
    factor: String,
}

impl Decoder<'_> {
    /// Adds all nodes, inputs and outputs.
    pub fn build(&self, graph: &mut Graph) {
        let config = self.config;
        for (name, length) in [("input_ids", SEQ), ("attention_mask", ALL), ("position_ids", SEQ)] {
            graph.input(name, ElementType::Int64, &[BATCH, length]);
        }
        let cache = |length| {
            [BATCH, Dim::Fixed(config.num_key_value_heads), length, Dim::Fixed(config.head_dim)]
        };
        for layer in 0..config.num_hidden_layers {
            for part in ["key", "value"] {
                let name = past(layer, part);
                graph.input(&name, ElementType::Float, &cache(PAST));
            }
        }
        graph.enter("model");
        let rows = graph.node("Gather", &["model.embed_tokens.weight", "input_ids"]);
        let mut x = to_float(graph, &rows); // (batch, seq, hidden_size)
        let shared = self.shared(graph);
        let mut present = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let name = format!("model.layers.{layer}");
            graph.enter(name.as_str());
            let h = self.norm(graph, &x, &format!("{name}.input_layernorm"), config.rms_norm_eps);
            let (attended, key_value) = self.attention(graph, &h, layer, &shared);
            x = graph.node("Add", &[&x, &attended]);
            let norm = format!("{name}.post_attention_layernorm");
            let h = self.norm(graph, &x, &norm, config.rms_norm_eps);
            let fed = self.feed_forward(graph, &h, &format!("{name}.mlp"));
            x = graph.node("Add", &[&x, &fed]);
            present.push(key_value);
        }
        graph.enter("model");
        let x = self.norm(graph, &x, "model.norm", config.rms_norm_eps);
        let logits = self.head(graph, &x);
        let vocabulary = Dim::Fixed(config.vocab_size);
        graph.output(&logits, "logits", ElementType::Float, &[BATCH, SEQ, vocabulary]);
        for (layer, [key, value]) in present.iter().enumerate() {
            for (from, part) in [(key, "key"), (value, "value")] {
                let name = format!("present.{layer}.{part}");
                graph.output(from, &name, ElementType::Float, &cache(ALL));
            }
        }
    }

    /// Angles and mask.
    fn shared(&self, graph: &mut Graph) -> Shared {
        let frequencies = inverse_frequencies(self.config.head_dim, self.config.rope_theta);
        let frequencies = graph.floats("inverse_frequencies", &frequencies);
        let last = graph.ints(&[-1]);
        let positions = graph.node("Unsqueeze", &["position_ids", &last]);
        let positions = to_float(graph, &positions);
        let angles = graph.node("Mul", &[&positions, &frequencies]); // (batch, seq, head_dim / 2)
        let heads = graph.ints(&[1]);
        let angles = graph.node("Unsqueeze", &[&angles, &heads]);
        let (cos, sin) = (graph.node("Cos", &[&angles]), graph.node("Sin", &[&angles]));

        let (zero, one) = (graph.int(0), graph.int(1));
        let [all, seq] = ["attention_mask", "input_ids"].map(|name| {
            let shape = graph.node("Shape", &[name]);
            graph.node("Gather", &[&shape, &one])
        });
        let past = graph.node("Sub", &[&all, &seq]);
        let keys = graph.node("Range", &[&zero, &all, &one]);
        let queries = graph.node("Range", &[&past, &all, &one]);
        let queries = graph.node("Unsqueeze", &[&queries, &last]); // (seq, 1)
        let causal = graph.node("LessOrEqual", &[&keys, &queries]); // (seq, all)
        let dims = graph.ints(&[1, 2]);
        let real = cast(graph, "attention_mask", ElementType::Bool);
        let real = graph.node("Unsqueeze", &[&real, &dims]); // (batch, 1, 1, all)
        let seen = graph.node("And", &[&real, &causal]); // (batch, 1, seq, all)
        // Not −∞, of which a row of padding, that sees nothing, would become NaN.
        let (keep, hide) = (graph.float(0.), graph.float(f32::MIN));
        let mut mask = graph.node("Where", &[&seen, &keep, &hide]);
        if let groups @ 2.. = self.groups() {
            let repeats = graph.ints(&[1, 1, groups, 1]);
            mask = graph.node("Tile", &[&mask, &repeats]);
        }
        Shared { cos, sin, mask }
    }

    /// Query heads for each head of keys and values.
    fn groups(&self) -> i64 {
        (self.config.num_attention_heads / self.config.num_key_value_heads) as i64
    }

    /// The output, and keys and values of all tokens.
    fn attention(
        &self,
        graph: &mut Graph,
        x: &str,
        layer: usize,
        shared: &Shared,
    ) -> (String, [String; 2]) {
        let config = self.config;
        let (heads, kv_heads) =
            (config.num_attention_heads as i64, config.num_key_value_heads as i64);
        let head_dim = config.head_dim as i64;
        let name = format!("model.layers.{layer}.self_attn");
        let projected = self.projections(graph, x, &name, &["q_proj", "k_proj", "v_proj"]);
        let by_heads = |graph: &mut Graph, x: &str, heads: i64| {
            let shape = graph.ints(&[0, 0, heads, head_dim]);
            let x = graph.node("Reshape", &[x, &shape]);
            transpose(graph, &x, &[0, 2, 1, 3]) // (batch, heads, seq, head_dim)
        };
        let q = by_heads(graph, &projected[0], heads);
        let k = by_heads(graph, &projected[1], kv_heads);
        let v = by_heads(graph, &projected[2], kv_heads);
        let (q, k) = (rotate(graph, &q, shared), rotate(graph, &k, shared));
        let appended = |graph: &mut Graph, part, new: &str| {
            let old = past(layer, part);
            graph.node_with("Concat", &[&old, new], &[("axis", Attribute::Int(2))])
        };
        let k = appended(graph, "key", &k); // (batch, kv_heads, all, head_dim)
        let v = appended(graph, "value", &v);
        // The heads of a group lie behind one another, so that none of keys and values is copied.
        let grouped = graph.ints(&[0, kv_heads, -1, head_dim]);
        let q = graph.node("Reshape", &[&q, &grouped]); // (batch, kv_heads, groups · seq, head_dim)
        let across = transpose(graph, &k, &[0, 1, 3, 2]);
        let scores = graph.node("MatMul", &[&q, &across]); // (batch, kv_heads, groups · seq, all)
        let scale = graph.float((config.head_dim as f32).sqrt().recip());
        let scores = graph.node("Mul", &[&scores, &scale]);
        let scores = graph.node("Add", &[&scores, &shared.mask]);
        let shares = graph.node_with("Softmax", &[&scores], &[("axis", Attribute::Int(-1))]);
        let y = graph.node("MatMul", &[&shares, &v]);
        let by_head = graph.ints(&[0, heads, -1, head_dim]);
        let y = graph.node("Reshape", &[&y, &by_head]);
        let y = transpose(graph, &y, &[0, 2, 1, 3]); // (batch, seq, heads, head_dim)
        let flat = graph.ints(&[0, 0, heads * head_dim]);
        let mut y = graph.node("Reshape", &[&y, &flat]);
        if let Some((norm, _)) = config.sub_norm_names() {
            y = self.norm(graph, &y, &format!("{name}.{norm}"), config.rms_norm_eps);
        }
        let y = self.projection(graph, &y, &name, "o_proj");
        (y, [k, v])
    }

    fn feed_forward(&self, graph: &mut Graph, x: &str, name: &str) -> String {
        let projected = self.projections(graph, x, name, &["gate_proj", "up_proj"]);
        let (gate, up) = (&projected[0], &projected[1]);
        let gate = match self.config.hidden_act {
            Activation::Relu2 => {
                let relu = graph.node("Relu", &[gate]);
                graph.node("Mul", &[&relu, &relu])
            }
            Activation::Silu => {
                let sigmoid = graph.node("Sigmoid", &[gate]);
                graph.node("Mul", &[gate, &sigmoid])
            }
        };
        let mut y = graph.node("Mul", &[&gate, up]);
        if let Some((_, norm)) = self.config.sub_norm_names() {
            y = self.norm(graph, &y, &format!("{name}.{norm}"), self.config.rms_norm_eps);
        }
        self.projection(graph, &y, name, "down_proj")
    }

    fn projection(&self, graph: &mut Graph, x: &str, module: &str, name: &str) -> String {
        self.projections(graph, x, module, &[name]).remove(0)
    }

    /// Projections of one input, which is quantized once unless each has a norm of its own.
    fn projections(&self, graph: &mut Graph, x: &str, module: &str, names: &[&str]) -> Vec<String> {
        let mut shared = None;
        let mut outputs = Vec::new();
        for name in names {
            let (linear, weight) = (format!("{module}.{name}"), format!("{module}.{name}.weight"));
            let projection = &self.projections[&weight];
            let (_, in_features) = projection.shape;
            let input = match self.quantization.input_norm_eps {
                Some(eps) => {
                    let x = self.norm(graph, x, &format!("{linear}.rms_norm"), eps);
                    &self.quantize(graph, &x, in_features)
                }
                None => &*shared.get_or_insert_with(|| self.quantize(graph, x, in_features)),
            };
            outputs.push(self.multiply(graph, input, &weight, projection));
        }
        outputs
    }

    /// `a = 127 / max(max|x|, 1e-5)`, `codes = round(x · a)`: as [`ActivationCodes`](crate::quant::ActivationCodes) has it.
    fn quantize(&self, graph: &mut Graph, x: &str, in_features: usize) -> Codes {
        let last = graph.ints(&[-1]);
        let absolute = graph.node("Abs", &[x]);
        let largest = graph.node("ReduceMax", &[&absolute, &last]); // (batch, seq, 1)
        let (least, top) = (graph.float(1e-5), graph.float(TOP));
        let largest = graph.node("Max", &[&largest, &least]);
        let factor = graph.node("Div", &[&top, &largest]);
        let scaled = graph.node("Mul", &[x, &factor]);
        let codes = match self.quantization.rounding {
            Rounding::HalfEven => graph.node("Round", &[&scaled]),
            Rounding::HalfUp => {
                let half = graph.float(0.5);
                let raised = graph.node("Add", &[&scaled, &half]);
                graph.node("Floor", &[&raised])
            }
        };
        let codes = match self.weights {
            OnnxWeights::Int8 => cast(graph, &codes, ElementType::Int8),
            OnnxWeights::Int2 => in_blocks(graph, &codes, in_features),
        };
        Codes { codes, factor }
    }

    /// `Σ code · weight · (scale / a)`; the sum is an integer.
    fn multiply(
        &self,
        graph: &mut Graph,
        input: &Codes,
        weight: &str,
        projection: &Projection,
    ) -> String {
        let (out_features, in_features) = projection.shape;
        let sums = match self.weights {
            OnnxWeights::Int8 => {
                let sums = graph.node("MatMulInteger", &[&input.codes, weight]);
                to_float(graph, &sums)
            }
            OnnxWeights::Int2 => {
                let blocks = layout::blocks(in_features);
                let int = |value: usize| Attribute::Int(value as i64);
                let attributes = [
                    ("K", int(blocks * BLOCK)),
                    ("N", int(out_features)),
                    ("bits", Attribute::Int(2)),
                    ("block_size", int(BLOCK)),
                    ("accuracy_level", Attribute::Int(4)), // int8
                ];
                let scales = ones_name(out_features, blocks);
                let inputs = [&input.codes, weight, &scales];
                graph.node_of((MICROSOFT, "MatMulNBits"), &inputs, &attributes)
            }
        };
        let scale = graph.named_float(format!("{weight}_scale"), projection.scale);
        let factor = graph.node("Div", &[&scale, &input.factor]);
        graph.node("Mul", &[&sums, &factor])
    }

    /// `x / √(mean(x²) + ε) · weight`, in the nodes that ONNX Runtime fuses.
    fn norm(&self, graph: &mut Graph, x: &str, name: &str, eps: f64) -> String {
        let (two, last) = (graph.float(2.), graph.ints(&[-1]));
        let squares = graph.node("Pow", &[x, &two]);
        let mean = graph.node("ReduceMean", &[&squares, &last]);
        let eps = graph.float(eps as f32);
        let mean = graph.node("Add", &[&mean, &eps]);
        let rms = graph.node("Sqrt", &[&mean]);
        let normed = graph.node("Div", &[x, &rms]);
        graph.node("Mul", &[&normed, &format!("{name}.weight")])
    }

    /// `x` (batch, seq, hidden_size) · headᵀ: (batch, seq, vocab_size).
    fn head(&self, graph: &mut Graph, x: &str) -> String {
        let config = self.config;
        let head = match config.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        let head = to_float(graph, head);
        let rows = graph.ints(&[-1, config.hidden_size as i64]);
        let x = graph.node("Reshape", &[x, &rows]);
        let logits = graph.node_with("Gemm", &[&x, &head], &[("transB", Attribute::Int(1))]);
        let (shape, vocabulary) =
            (graph.node("Shape", &["input_ids"]), graph.ints(&[config.vocab_size as i64]));
        let shape =
            graph.node_with("Concat", &[&shape, &vocabulary], &[("axis", Attribute::Int(0))]);
        graph.node("Reshape", &[&logits, &shape])
    }
}

/// The name of the tensor (out_features, blocks) of ones, which are the scales of blocks: a matrix has one scale.
pub(super) fn ones_name(out_features: usize, blocks: usize) -> String {
    format!("ones.{out_features}.{blocks}")
}

fn past(layer: usize, part: &str) -> String {
    format!("past_key_values.{layer}.{part}")
}

/// `codes` (batch, seq, in_features) with a [`TOP`] at the end of each block: (batch, seq, blocks · [`BLOCK`]).
fn in_blocks(graph: &mut Graph, codes: &str, in_features: usize) -> String {
    let blocks = layout::blocks(in_features);
    let missing = blocks * BLOCK_WEIGHTS - in_features;
    let top = graph.float(TOP);
    let mut codes = codes.to_owned();
    if missing > 0 {
        let pads = graph.ints(&[0, 0, 0, 0, 0, missing as i64]);
        codes = graph.node("Pad", &[&codes, &pads, &top]);
    }
    let by_block = graph.ints(&[0, 0, blocks as i64, BLOCK_WEIGHTS as i64]);
    let codes = graph.node("Reshape", &[&codes, &by_block]);
    let pads = graph.ints(&[0, 0, 0, 0, 0, 0, 0, 1]);
    let codes = graph.node("Pad", &[&codes, &pads, &top]);
    let flat = graph.ints(&[0, 0, (blocks * BLOCK) as i64]);
    graph.node("Reshape", &[&codes, &flat])
}

/// Turns `x` (batch, heads, seq, head_dim): the pair `(x[i], x[i + head_dim / 2])` by the i-th angle.
fn rotate(graph: &mut Graph, x: &str, angles: &Shared) -> String {
    let Shared { cos, sin, .. } = angles;
    let [x1, x2] = graph.halves(x);
    let mut turned = |a: &str, operator: &str, b: &str| {
        let (a, b) = (graph.node("Mul", &[a, cos]), graph.node("Mul", &[b, sin]));
        graph.node(operator, &[&a, &b])
    };
    let (y1, y2) = (turned(&x1, "Sub", &x2), turned(&x2, "Add", &x1));
    graph.node_with("Concat", &[&y1, &y2], &[("axis", Attribute::Int(-1))])
}

fn transpose(graph: &mut Graph, x: &str, order: &[i64]) -> String {
    graph.node_with("Transpose", &[x], &[("perm", Attribute::Ints(order))])
}

fn cast(graph: &mut Graph, x: &str, to: ElementType) -> String {
    graph.node_with("Cast", &[x], &[("to", Attribute::Int(to as i64))])
}

fn to_float(graph: &mut Graph, x: &str) -> String {
    cast(graph, x, ElementType::Float)
}
