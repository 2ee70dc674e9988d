//! GGUF files written byte by byte, and ggml's block types packed by their definitions: the naive other side of the reader.

use std::collections::BTreeMap;

/// A file to write; everything in the order of writing.
#[derive(Clone)]
pub struct File {
    pub version: u32,
    pub alignment: usize,
    pub values: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

/// A tensor; dimensions as in the file, innermost first.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// Numbers of element types.
pub mod kind {
    pub const F32: u32 = 0;
    pub const F16: u32 = 1;
    pub const Q4_0: u32 = 2;
    pub const Q8_0: u32 = 8;
    pub const Q4_K: u32 = 12;
    pub const Q6_K: u32 = 14;
    pub const BF16: u32 = 30;
    pub const TQ1_0: u32 = 34;
    pub const TQ2_0: u32 = 35;
    pub const I2_S: u32 = 36;
}

/// A string with its length.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Values with their types.
pub fn u32(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn f32(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn bool(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[value.into()]].concat()
}

pub fn string(value: &str) -> Vec<u8> {
    [8u32.to_le_bytes().to_vec(), text(value)].concat()
}

fn list(kind: u32, items: &[Vec<u8>]) -> Vec<u8> {
    let len = items.len() as u64;
    [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes(), &items.concat()].concat()
}

pub fn strings<S: AsRef<str>>(items: &[S]) -> Vec<u8> {
    list(8, &Vec::from_iter(items.iter().map(|item| text(item.as_ref()))))
}

pub fn floats(items: &[f32]) -> Vec<u8> {
    list(6, &Vec::from_iter(items.iter().map(|item| item.to_le_bytes().to_vec())))
}

pub fn integers(items: &[i32]) -> Vec<u8> {
    list(5, &Vec::from_iter(items.iter().map(|item| item.to_le_bytes().to_vec())))
}

impl Default for File {
    fn default() -> Self {
        Self { version: 3, alignment: 32, values: Vec::new(), tensors: Vec::new() }
    }
}

impl File {
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a value, in its old place if there is one.
    pub fn set(&mut self, key: &str, value: Vec<u8>) -> &mut Self {
        match self.values.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.values.push((key.into(), value)),
        }
        self
    }

    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.values.retain(|(name, _)| name != key);
        self
    }

    pub fn push(&mut self, name: &str, dims: &[usize], kind: u32, data: Vec<u8>) -> &mut Self {
        let dims = dims.iter().rev().map(|dim| *dim as u64).collect();
        self.tensors.push(Tensor { name: name.into(), dims, kind, data });
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// What stands in front of the data, and the data.
    pub fn parts(&self) -> (Vec<u8>, Vec<u8>) {
        let mut header = b"GGUF".to_vec();
        header.extend(self.version.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            header.extend(text(key));
            header.extend(value);
        }
        let mut data = Vec::new();
        for Tensor { name, dims, kind, data: bytes } in &self.tensors {
            header.extend(text(name));
            header.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| header.extend(dim.to_le_bytes()));
            header.extend(kind.to_le_bytes());
            header.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        header.resize(header.len().next_multiple_of(self.alignment), 0);
        (header, data)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (header, data) = self.parts();
        [header, data].concat()
    }
}

/// A matrix of ternary codes, weight + 1, row by row, and the scale that multiplies.
#[derive(Clone, Debug)]
pub struct Codes {
    pub rows: usize,
    pub cols: usize,
    pub codes: Vec<u8>,
    pub scale: f32,
}

impl Codes {
    /// Reads the Hub's packing.
    pub fn from_hub(bytes: &[u8], cols: usize, scale: f32) -> Self {
        let rows = 4 * bytes.len() / cols;
        let code = |row: usize, col: usize| {
            bytes[row % (rows / 4) * cols + col] >> (2 * (row / (rows / 4))) & 3
        };
        let codes = (0..rows).flat_map(|row| (0..cols).map(move |col| code(row, col))).collect();
        Self { rows, cols, codes, scale }
    }

    /// The rows in another order.
    pub fn reordered(&self, order: impl Fn(usize) -> usize) -> Self {
        let row = |row: usize| self.codes[order(row) * self.cols..][..self.cols].to_vec();
        Self { codes: (0..self.rows).flat_map(row).collect(), ..self.clone() }
    }

    /// The type and the bytes of a block type.
    pub fn pack(&self, kind: u32) -> Vec<u8> {
        match kind {
            kind::I2_S => self.i2_s(),
            kind::TQ1_0 => self.blocks(tq1_0),
            kind::TQ2_0 => self.blocks(tq2_0),
            _ => panic!("{kind} is not ternary"),
        }
    }

    /// 128 codes in 32 bytes: byte j holds weights j, j + 32, j + 64 and j + 96, high bits first.
    fn i2_s(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; self.codes.len() / 4];
        for (i, code) in self.codes.iter().enumerate() {
            let (block, within) = (i / 128, i % 128);
            bytes[block * 32 + within % 32] |= code << (6 - 2 * (within / 32));
        }
        bytes.extend(self.scale.to_le_bytes());
        bytes.resize(self.codes.len() / 4 + 32, 0xaa); // what follows the scale means nothing
        bytes
    }

    fn blocks(&self, pack: impl Fn(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let scale = half::f16::from_f32(self.scale);
        assert_eq!(scale.to_f32(), self.scale, "the blocks' scale is f16");
        let block = |codes: &[u8]| {
            // Zeros have the scale 0, as ggml's quantizer gives them.
            let scale = if codes.iter().all(|code| *code == 1) { half::f16::ZERO } else { scale };
            [pack(codes), scale.to_le_bytes().to_vec()].concat()
        };
        self.codes.chunks(256).flat_map(block).collect()
    }
}

/// Two halves of 128 codes: byte j holds weights j, j + 32, j + 64 and j + 96, low bits first.
fn tq2_0(codes: &[u8]) -> Vec<u8> {
    let byte = |half: usize, j: usize| {
        (0..4).fold(0, |byte, field| byte | codes[128 * half + 32 * field + j] << (2 * field))
    };
    (0..64).map(|i| byte(i / 32, i % 32)).collect()
}

/// Digits in base 3 of the fraction byte / 256, rounded up: five of 32 bytes, five of 16, four of 4.
fn tq1_0(codes: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (first, width, digits) in [(0, 32, 5), (160, 16, 5), (240, 4, 4)] {
        for j in 0..width {
            let number = (0..5).fold(0u32, |number, digit| {
                let code = if digit < digits { codes[first + digit * width + j] } else { 0 };
                3 * number + u32::from(code)
            });
            bytes.push((number * 256).div_ceil(243) as u8);
        }
    }
    bytes
}

/// Blocks of few bits from raw bytes, each weight by its definition.
pub fn dequantize(kind: u32, bytes: &[u8]) -> Vec<f32> {
    let half =
        |block: &[u8], at: usize| half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let mut weights = Vec::new();
    match kind {
        kind::Q8_0 => bytes.chunks(34).for_each(|b| {
            weights.extend((0..32).map(|i| half(b, 0) * f32::from(b[2 + i] as i8)));
        }),
        kind::Q4_0 => bytes.chunks(18).for_each(|b| {
            let nibble = |i: usize| b[2 + i % 16] >> (4 * (i / 16)) & 15;
            weights.extend((0..32).map(|i| half(b, 0) * (f32::from(nibble(i)) - 8.)));
        }),
        kind::Q4_K => bytes.chunks(144).for_each(|b| {
            let s = &b[4..16];
            for i in 0..256 {
                let group = i / 32;
                let (scale, min) = match group {
                    0..4 => (s[group] & 63, s[group + 4] & 63),
                    _ => (
                        (s[group + 4] & 15) | (s[group - 4] >> 6) << 4,
                        (s[group + 4] >> 4) | (s[group] >> 6) << 4,
                    ),
                };
                let byte = b[16 + 32 * (i / 64) + i % 32];
                let nibble = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                let (d, m) = (half(b, 0) * f32::from(scale), half(b, 2) * f32::from(min));
                weights.push(d * f32::from(nibble) - m);
            }
        }),
        kind::Q6_K => bytes.chunks(210).for_each(|b| {
            for i in 0..256 {
                let (n, within) = (i / 128, i % 128);
                let low = b[64 * n + within % 64] >> (4 * (within / 64)) & 15;
                let high = b[128 + 32 * n + within % 32] >> (2 * (within / 32)) & 3;
                let scale = half(b, 208) * f32::from(b[192 + i / 16] as i8);
                weights.push(scale * f32::from(i16::from(high << 4 | low) - 32));
            }
        }),
        _ => panic!("{kind} is not of few bits"),
    }
    weights
}

/// The metadata of a vocabulary of byte-level pairs, from its `tokenizer.json`.
pub fn byte_level(file: &mut File, tokenizer: &serde_json::Value) {
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let mut tokens: BTreeMap<u64, (&str, i32)> =
        vocab.iter().map(|(token, id)| (id.as_u64().unwrap(), (token.as_str(), 1))).collect();
    for added in tokenizer["added_tokens"].as_array().unwrap() {
        tokens.insert(added["id"].as_u64().unwrap(), (added["content"].as_str().unwrap(), 3));
    }
    let (tokens, kinds): (Vec<&str>, Vec<i32>) = tokens.into_values().unzip();
    let merge = |merge: &serde_json::Value| match merge.as_array() {
        Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        None => merge.as_str().unwrap().to_owned(),
    };
    let merges: Vec<String> =
        tokenizer["model"]["merges"].as_array().unwrap().iter().map(merge).collect();
    file.set("tokenizer.ggml.model", string("gpt2"))
        .set("tokenizer.ggml.pre", string("gpt-2"))
        .set("tokenizer.ggml.tokens", strings(&tokens))
        .set("tokenizer.ggml.token_type", integers(&kinds))
        .set("tokenizer.ggml.merges", strings(&merges))
        .set("tokenizer.ggml.add_bos_token", bool(true));
}
