//! A naive forward pass in f64 from the raw tensors: loops, exact integer products, nothing shared with
//! the library but the file reader. It also keeps every activation code and how close to a tie of the
//! rounding it came, which is how a flipped code is told from an error.

use std::collections::BTreeMap;

use bitnet_model::{
    config::{Activation, ScaleConvention, WeightForm},
    quant::Rounding,
};
use candle_core::DType;

use crate::fixture::Fixture;

/// One projection's int8 codes, row after row, and each row's smallest distance to a rounding tie.
#[derive(Clone, Debug, Default)]
pub struct Codes {
    pub codes: Vec<Vec<i8>>,
    pub tie_distance: Vec<f64>,
}

/// What the oracle saw.
pub struct Run {
    pub logits: Vec<Vec<f64>>,
    /// By the projection's name: `model.layers.0.self_attn.q_proj`.
    pub codes: BTreeMap<String, Codes>,
}

struct Oracle<'a> {
    fixture: &'a Fixture,
    codes: BTreeMap<String, Codes>,
}

type Rows = Vec<Vec<f64>>;

impl Oracle<'_> {
    fn tensor(&self, name: &str) -> Vec<f64> {
        let tensor = self.fixture.checkpoint.read(name).unwrap();
        tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn norm(&self, x: &Rows, name: &str, eps: f64) -> Rows {
        let weight = self.tensor(&format!("{name}.weight"));
        x.iter()
            .map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
                row.iter().zip(&weight).map(|(x, w)| x / (mean + eps).sqrt() * w).collect()
            })
            .collect()
    }

    /// Ternary values (out, in) and the scale that multiplies.
    fn weight(&self, name: &str, inputs: usize) -> (Vec<i64>, f64) {
        let quantization = self.fixture.config.quantization.unwrap();
        match quantization.weights {
            WeightForm::Packed(convention) => {
                let bytes = self.fixture.checkpoint.read_bytes(&format!("{name}.weight")).unwrap();
                let scale = self.tensor(&format!("{name}.weight_scale"))[0];
                let values = (0..4).flat_map(|field| {
                    bytes.iter().map(move |b| i64::from(b >> (2 * field) & 3) - 1)
                });
                assert_eq!(bytes.len() % inputs, 0);
                let scale = match convention {
                    ScaleConvention::Multiply => scale,
                    ScaleConvention::Divide => 1. / scale,
                };
                (values.collect(), scale)
            }
            WeightForm::Latent => {
                let latent = self.tensor(&format!("{name}.weight"));
                let mean = latent.iter().map(|w| w.abs()).sum::<f64>() / latent.len() as f64;
                let scale = mean.max(1e-5);
                let ternary =
                    |w: &f64| round(w / scale, quantization.rounding).clamp(-1., 1.) as i64;
                (latent.iter().map(ternary).collect(), scale)
            }
        }
    }

    fn linear(&mut self, x: &Rows, name: &str) -> Rows {
        let quantization = self.fixture.config.quantization.unwrap();
        let x = match quantization.input_norm_eps {
            Some(eps) => self.norm(x, &format!("{name}.rms_norm"), eps),
            None => x.clone(),
        };
        let inputs = x[0].len();
        let (weight, scale) = self.weight(name, inputs);
        let mut seen = Codes::default();
        let y = x
            .iter()
            .map(|row| {
                let a = 127. / row.iter().fold(0f64, |m, x| m.max(x.abs())).max(1e-5);
                let codes: Vec<i64> = row
                    .iter()
                    .map(|x| round(x * a, quantization.rounding).clamp(-128., 127.) as i64)
                    .collect();
                let distance = |x: &f64| ((x * a).rem_euclid(1.) - 0.5).abs();
                seen.tie_distance.push(row.iter().map(distance).fold(1., f64::min));
                seen.codes.push(codes.iter().map(|&code| code as i8).collect());
                weight
                    .chunks(inputs)
                    .map(|w| w.iter().zip(&codes).map(|(w, c)| w * c).sum::<i64>() as f64)
                    .map(|sum| sum / a * scale)
                    .collect()
            })
            .collect();
        self.codes.insert(name.to_string(), seen);
        y
    }

    fn attention(&mut self, h: &Rows, name: &str) -> Rows {
        let config = &self.fixture.config;
        let (heads, kv_heads, dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let theta = config.rope_theta;
        let rope = |rows: Rows| -> Rows {
            rows.into_iter()
                .enumerate()
                .map(|(position, row)| {
                    let mut out = row.clone();
                    for (index, out) in out.iter_mut().enumerate() {
                        let (head, i) = (index / dim * dim, index % dim);
                        let pair = i % (dim / 2);
                        let frequency = theta.powf(-((2 * pair) as f64) / dim as f64);
                        let (sin, cos) = (position as f64 * frequency).sin_cos();
                        let other = match i < dim / 2 {
                            true => -row[head + i + dim / 2],
                            false => row[head + i - dim / 2],
                        };
                        *out = row[index] * cos + other * sin;
                    }
                    out
                })
                .collect()
        };
        let q = rope(self.linear(h, &format!("{name}.q_proj")));
        let k = rope(self.linear(h, &format!("{name}.k_proj")));
        let v = self.linear(h, &format!("{name}.v_proj"));
        let mut out = vec![vec![0.; heads * dim]; h.len()];
        for (i, out) in out.iter_mut().enumerate() {
            for head in 0..heads {
                let at = head / (heads / kv_heads) * dim;
                let dot = |j: usize| -> f64 {
                    (0..dim).map(|d| q[i][head * dim + d] * k[j][at + d]).sum()
                };
                let scores: Vec<f64> = (0..=i).map(|j| dot(j) / (dim as f64).sqrt()).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (j, score) in scores.iter().enumerate() {
                    for d in 0..dim {
                        out[head * dim + d] += (score - max).exp() / total * v[j][at + d];
                    }
                }
            }
        }
        out
    }
}

fn round(x: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::HalfEven => x.round_ties_even(),
        Rounding::HalfUp => (x + 0.5).floor(),
    }
}

fn add(x: &mut Rows, y: Rows) {
    for (x, y) in x.iter_mut().flatten().zip(y.into_iter().flatten()) {
        *x += y;
    }
}

/// Runs the fixture's model over one sequence.
pub fn run(fixture: &Fixture, tokens: &[u32]) -> Run {
    let config = &fixture.config;
    let mut oracle = Oracle { fixture, codes: BTreeMap::new() };
    let eps = config.rms_norm_eps;
    let embedding = oracle.tensor("model.embed_tokens.weight");
    let row = |id: u32| &embedding[id as usize * config.hidden_size..][..config.hidden_size];
    let mut x: Rows = tokens.iter().map(|&id| row(id).to_vec()).collect();
    for layer in 0..config.num_hidden_layers {
        let name = format!("model.layers.{layer}");
        let h = oracle.norm(&x, &format!("{name}.input_layernorm"), eps);
        let mut a = oracle.attention(&h, &format!("{name}.self_attn"));
        if let Some((attn, _)) = config.sub_norm_names() {
            a = oracle.norm(&a, &format!("{name}.self_attn.{attn}"), eps);
        }
        add(&mut x, oracle.linear(&a, &format!("{name}.self_attn.o_proj")));
        let h = oracle.norm(&x, &format!("{name}.post_attention_layernorm"), eps);
        let mut m = oracle.linear(&h, &format!("{name}.mlp.gate_proj"));
        let up = oracle.linear(&h, &format!("{name}.mlp.up_proj"));
        for (gate, up) in m.iter_mut().flatten().zip(up.iter().flatten()) {
            *gate = up
                * match config.hidden_act {
                    Activation::Relu2 => gate.max(0.).powi(2),
                    Activation::Silu => *gate / (1. + (-*gate).exp()),
                };
        }
        if let Some((_, ffn)) = config.sub_norm_names() {
            m = oracle.norm(&m, &format!("{name}.mlp.{ffn}"), eps);
        }
        add(&mut x, oracle.linear(&m, &format!("{name}.mlp.down_proj")));
    }
    let x = oracle.norm(&x, "model.norm", eps);
    let head = match config.tie_word_embeddings {
        true => embedding,
        false => oracle.tensor("lm_head.weight"),
    };
    let logits = x
        .iter()
        .map(|x| {
            head.chunks(config.hidden_size)
                .map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum())
                .collect()
        })
        .collect();
    Run { logits, codes: oracle.codes }
}
