//! Bytes of a checkpoint that exists nowhere: a safetensors file whose data is a function of the
//! position in it, so that any part of it can be made at any time, by any thread.
//!
//! Word `i` of a tensor, eight bytes, is the `i`-th output of SplitMix64 (Steele, Lea, Flood, "Fast
//! splittable pseudorandom number generators", 2014) from a seed of the tensor's name, put into the
//! form of its [`Content`].

use std::io;

use safetensors::Dtype;

use super::{Checkpoint, source::Source, spans::Spans};
use crate::error::{Error, Result};

/// What the values of a generated tensor look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Content {
    /// U8: four ternary codes a byte, each uniform over 0, 1, 2.
    Codes,
    /// BF16: symmetric about 0, standard deviation ½.
    Embedding,
    /// BF16: uniform within a quarter of this value.
    Around(f32),
}

/// One tensor to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Values, and with them the element type.
    pub content: Content,
}

impl Content {
    fn dtype(self) -> Dtype {
        match self {
            Self::Codes => Dtype::U8,
            Self::Embedding | Self::Around(_) => Dtype::BF16,
        }
    }
}

impl Checkpoint {
    /// A checkpoint of random values, the same ones for the same names; `name` stands for the path in
    /// errors.
    ///
    /// # Errors
    /// Two tensors of one name, or a size that is not representable.
    pub fn generated(name: &str, tensors: &[GeneratedTensor]) -> Result<Self> {
        let source = Source::Generated(Generated::new(name, tensors)?);
        Self::from_sources(name.into(), vec![(name.into(), source)])
    }
}

/// The file: a header, then the tensors.
#[derive(Debug)]
pub(super) struct Generated(Spans<Part>);

#[derive(Debug)]
enum Part {
    Header(Vec<u8>),
    Tensor(Values),
}

/// What a tensor is made of.
#[derive(Debug)]
struct Values {
    seed: u64,
    content: Content,
}

impl Generated {
    fn new(name: &str, tensors: &[GeneratedTensor]) -> Result<Self> {
        let mut header = serde_json::Map::new();
        let mut parts = Vec::with_capacity(tensors.len());
        let mut end = 0;
        for GeneratedTensor { name: tensor, shape, content } in tensors {
            let dtype = content.dtype();
            let bytes = super::header::data_bytes(dtype, shape).ok_or_else(|| Error::Tensor {
                path: name.into(),
                name: tensor.clone(),
                reason: format!("shape {shape:?} of {dtype} is not representable"),
            })?;
            let start = end;
            end += bytes;
            let entry = serde_json::json!({
                "dtype": dtype.to_string(), "shape": shape, "data_offsets": [start, end],
            });
            header.insert(tensor.clone(), entry);
            parts.push((bytes, Values { seed: seed(tensor), content: *content }));
        }
        let json = serde_json::Value::Object(header).to_string();
        let header = [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
        let mut spans = Spans::default();
        spans.push(header.len() as u64, Part::Header(header));
        for (bytes, values) in parts {
            spans.push(bytes as u64, Part::Tensor(values));
        }
        Ok(Self(spans))
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Makes the bytes at `offset`; fails when the file ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset, |part, at, out| {
            match part {
                Part::Header(header) => out.copy_from_slice(&header[at as usize..][..out.len()]),
                Part::Tensor(values) => values.fill(at, out),
            }
            Ok(())
        })
    }
}

impl Values {
    /// The bytes `at ..` of the tensor.
    fn fill(&self, at: u64, out: &mut [u8]) {
        let skip = (at % 8) as usize;
        let (ragged, out) = out.split_at_mut(((8 - skip) % 8).min(out.len()));
        ragged.copy_from_slice(&self.word(at / 8)[skip..][..ragged.len()]);
        let mut index = at.div_ceil(8);
        let (words, tail) = out.as_chunks_mut::<8>();
        for word in words {
            *word = self.word(index);
            index += 1;
        }
        tail.copy_from_slice(&self.word(index)[..tail.len()]);
    }

    #[inline]
    fn word(&self, index: u64) -> [u8; 8] {
        let random = split_mix(self.seed, index);
        match self.content {
            Content::Codes => random.to_le_bytes().map(|byte| CODES[usize::from(byte)]),
            Content::Embedding => {
                let [a, b, c, d, e, f, g, h] = random.to_le_bytes();
                let high = |byte: u8| EMBEDDING_HIGH[usize::from(byte)];
                [a, high(b), c, high(d), e, high(f), g, high(h)]
            }
            Content::Around(mean) => {
                let mut word = [0; 8];
                for (i, out) in word.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let fraction = f32::from((random >> (16 * i)) as u16) / 65536.;
                    *out = half::bf16::from_f32(mean * (0.75 + 0.5 * fraction)).to_le_bytes();
                }
                word
            }
        }
    }
}

/// The `index`-th output of SplitMix64.
#[inline]
fn split_mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// FNV-1a of a name: where its tensor's random numbers begin.
fn seed(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The 81 bytes of four codes none of which is 3, about equally often (256 = 3 · 81 + 13).
static CODES: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let digits = byte % 81;
        let (a, b, c, d) = (digits % 3, digits / 3 % 3, digits / 9 % 3, digits / 27);
        table[byte] = (a | b << 2 | c << 4 | d << 6) as u8;
        byte += 1;
    }
    table
};

/// The high byte of a bf16 holds the sign and all bits of the exponent but the last: 0x3e is
/// [1/8, 1/2), 0x3f is [1/2, 2). With a uniform low byte their mean squares are 0.0911 and 1.458, so
/// the second at 30 of 256 makes the variance 0.0911 · 226/256 + 1.458 · 30/256 = 0.25.
static EMBEDDING_HIGH: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let magnitude = if byte / 2 < 113 { 0x3e } else { 0x3f };
        table[byte] = magnitude | ((byte as u8 & 1) << 7);
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], content: Content) -> GeneratedTensor {
        GeneratedTensor { name: name.into(), shape: shape.into(), content }
    }

    fn small() -> Generated {
        let tensors = [
            tensor("codes", &[40, 27], Content::Codes),
            tensor("scale", &[1], Content::Around(1.5)),
            tensor("embedding", &[100, 64], Content::Embedding),
            tensor("gain", &[331], Content::Around(0.018)),
        ];
        Generated::new("small", &tensors).unwrap()
    }

    #[test]
    fn any_cut_gives_the_same_bytes() {
        let file = small();
        let mut whole = vec![0; file.len() as usize];
        file.read_exact_at(&mut whole, 0).unwrap();
        for (offset, len) in [(0, 9), (3, 800), (400, 1000), (1441, 7), (1443, 5000), (9000, 1)] {
            let mut part = vec![0; len];
            file.read_exact_at(&mut part, offset as u64).unwrap();
            assert_eq!(part, whole[offset..][..len], "{len} bytes at {offset}");
        }
        assert!(file.read_exact_at(&mut [0; 2], file.len() - 1).is_err());
        assert!(file.read_exact_at(&mut [0; 2], u64::MAX).is_err());
    }

    #[test]
    fn values_are_what_their_content_says() {
        let tensors = [
            tensor("codes", &[300, 100], Content::Codes),
            tensor("embedding", &[300, 100], Content::Embedding),
            tensor("gain", &[30_000], Content::Around(0.1)),
        ];
        let checkpoint = Checkpoint::generated("values", &tensors).unwrap();
        let mut counts = [0f64; 4];
        for byte in checkpoint.read_bytes("codes").unwrap() {
            (0..4).for_each(|field| counts[usize::from(byte >> (2 * field) & 3)] += 1.);
        }
        assert_eq!(counts[3], 0.);
        // Three standard deviations of a count of 120000, and the table's 256 = 3 · 81 + 13.
        assert!(counts[..3].iter().all(|n| (n / 120_000. - 1. / 3.).abs() < 0.02), "{counts:?}");
        let floats = |name| -> Vec<f32> {
            let tensor = checkpoint.read(name).unwrap().flatten_all().unwrap();
            tensor.to_dtype(candle_core::DType::F32).unwrap().to_vec1().unwrap()
        };
        let embedding = floats("embedding");
        let moment = |n| embedding.iter().map(|x| x.powi(n)).sum::<f32>() / embedding.len() as f32;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 0.25).abs() < 0.01, "{}", moment(2));
        assert!(floats("gain").iter().all(|x| (0.0749..=0.1251).contains(x)));
    }
}
