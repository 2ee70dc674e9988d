//! The first 64 bytes of a shard.

const MAGIC: &[u8; 8] = b"bitnetok";
const VERSION: u32 = 1;
pub(super) const HEADER_BYTES: usize = 64;

/// What the tokens of a set follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dataset) struct Identity {
    /// Fingerprint of the vocabulary.
    pub vocabulary: u64,
    /// Fingerprint of the files and of how they are read.
    pub source: u64,
    /// Bytes of a token: 2 or 4.
    pub width: usize,
}

/// `magic version width last vocabulary source tokens documents bytes hash`: 8 bytes each, but version (4), width and
/// last (2 each).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub width: usize,
    /// Whether no shard of the set follows.
    pub is_last: bool,
    pub vocabulary: u64,
    pub source: u64,
    pub tokens: u64,
    pub documents: u64,
    /// UTF-8 bytes of the documents.
    pub bytes: u64,
    /// FNV-1a of the set's tokens as u32 up to the end of this shard.
    pub hash: u64,
}

impl Header {
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..14].copy_from_slice(&(self.width as u16).to_le_bytes());
        bytes[14..16].copy_from_slice(&u16::from(self.is_last).to_le_bytes());
        let numbers =
            [self.vocabulary, self.source, self.tokens, self.documents, self.bytes, self.hash];
        for (place, number) in bytes[16..].chunks_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// The header of a shard of the set `identity`, or why it is none.
    pub fn read(file: &[u8], identity: Identity) -> Result<Self, String> {
        let Some(bytes) = file.first_chunk::<HEADER_BYTES>() else {
            return Err(format!("is no shard of tokens: it has {} bytes", file.len()));
        };
        if !bytes.starts_with(MAGIC) {
            return Err("is no shard of tokens".into());
        }
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
        };
        let version = number(8, 4);
        if version != u64::from(VERSION) {
            return Err(format!(
                "has version {version}, not {VERSION}; delete its folder, it is written again"
            ));
        }
        let header = Self {
            width: number(12, 2) as usize,
            is_last: number(14, 2) != 0,
            vocabulary: number(16, 8),
            source: number(24, 8),
            tokens: number(32, 8),
            documents: number(40, 8),
            bytes: number(48, 8),
            hash: number(56, 8),
        };
        if (header.vocabulary, header.width) != (identity.vocabulary, identity.width) {
            return Err("is of another vocabulary; delete its folder, it is written again".into());
        }
        if header.source != identity.source {
            return Err("is of other text; delete its folder, it is written again".into());
        }
        Ok(header)
    }
}
