//! What stands in front of the data of a file to write: metadata, and the tensors' places.

use super::blocks::BlockType;

/// The alignment of tensors where none is told.
const ALIGNMENT: usize = 32;

/// The bytes of a header, as far as it goes.
#[derive(Debug, Default)]
pub(super) struct Writer {
    values: Vec<u8>,
    value_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data_bytes: u64,
}

/// Types of values, by the format's numbers.
mod kind {
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const LIST: u32 = 9;
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Writer {
    fn value(&mut self, key: &str, kind: u32) -> &mut Vec<u8> {
        self.value_count += 1;
        put_text(&mut self.values, key);
        self.values.extend(kind.to_le_bytes());
        &mut self.values
    }

    fn list(&mut self, key: &str, kind: u32, len: usize) -> &mut Vec<u8> {
        let bytes = self.value(key, kind::LIST);
        bytes.extend(kind.to_le_bytes());
        bytes.extend((len as u64).to_le_bytes());
        bytes
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.value(key, kind::U32).extend(value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.value(key, kind::F32).extend(value.to_le_bytes());
    }

    pub fn boolean(&mut self, key: &str, value: bool) {
        self.value(key, kind::BOOL).push(value.into());
    }

    pub fn string(&mut self, key: &str, value: &str) {
        put_text(self.value(key, kind::STRING), value);
    }

    pub fn strings(&mut self, key: &str, values: &[String]) {
        let bytes = self.list(key, kind::STRING, values.len());
        values.iter().for_each(|value| put_text(bytes, value));
    }

    pub fn integers(&mut self, key: &str, values: &[i32]) {
        let bytes = self.list(key, kind::I32, values.len());
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    }

    /// Places the next tensor; dimensions outermost first.
    pub fn tensor(&mut self, name: &str, dims: &[usize], block: BlockType, bytes: u64) {
        self.tensor_count += 1;
        put_text(&mut self.tensors, name);
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        for dim in dims.iter().rev() {
            self.tensors.extend((*dim as u64).to_le_bytes());
        }
        self.tensors.extend(block.number().to_le_bytes());
        self.tensors.extend(self.data_bytes.to_le_bytes());
        self.data_bytes += bytes.next_multiple_of(ALIGNMENT as u64);
    }

    /// The header, as long as the data's alignment wants it.
    pub fn into_bytes(self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.value_count.to_le_bytes());
        bytes.extend(self.values);
        bytes.extend(self.tensors);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }
}

/// Zeros up to where the tensor behind `bytes` begins.
pub(super) fn padding(bytes: u64) -> &'static [u8] {
    let short = bytes.next_multiple_of(ALIGNMENT as u64) - bytes;
    &[0; ALIGNMENT][..short as usize]
}
