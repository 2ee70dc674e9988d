//! The wire format of protocol buffers (<https://protobuf.dev/programming-guides/encoding/>), as far as ONNX takes it:
//! varints, four-byte floats, and everything else as bytes with a length in front.

/// A message as it is written.
#[derive(Clone, Debug, Default)]
pub(super) struct Message(Vec<u8>);

/// The kinds of fields, in the low three bits of a key.
mod kind {
    pub const VARINT: u64 = 0;
    pub const FIXED64: u64 = 1;
    pub const BYTES: u64 = 2;
    pub const FIXED32: u64 = 5;
}

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, kind: u64) {
        self.varint(field << 3 | kind);
    }

    /// An integer; negative ones as their two's complement.
    pub fn int(mut self, field: u64, value: i64) -> Self {
        self.key(field, kind::VARINT);
        self.varint(value as u64);
        self
    }

    pub fn ints(self, field: u64, values: impl IntoIterator<Item = i64>) -> Self {
        values.into_iter().fold(self, |message, value| message.int(field, value))
    }

    pub fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.key(field, kind::BYTES);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    pub fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    pub fn texts<'a>(self, field: u64, texts: impl IntoIterator<Item = &'a str>) -> Self {
        texts.into_iter().fold(self, |message, text| message.text(field, text))
    }

    pub fn message(self, field: u64, message: &Self) -> Self {
        self.bytes(field, &message.0)
    }

    pub fn messages<'a>(self, field: u64, messages: impl IntoIterator<Item = &'a Self>) -> Self {
        messages.into_iter().fold(self, |message, part| message.message(field, part))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The value of a field as it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Int(u64),
    Bytes(&'a [u8]),
    /// A number of fixed width, of which this project's readers need none.
    Fixed,
}

impl<'a> Value<'a> {
    pub fn int(self) -> Option<u64> {
        match self {
            Self::Int(value) => Some(value),
            _ => None,
        }
    }

    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub fn text(self) -> Option<&'a str> {
        self.bytes().and_then(|bytes| std::str::from_utf8(bytes).ok())
    }
}

/// The fields of a message, in order; ends with `None` in place of a field where the bytes are no message.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            // The tenth byte has one bit left to give.
            if shift == 63 && byte > 1 {
                return None;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(usize::try_from(len).ok()?)?;
        self.rest = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            kind::VARINT => Value::Int(self.varint()?),
            kind::FIXED64 => self.take(8).map(|_| Value::Fixed)?,
            kind::FIXED32 => self.take(4).map(|_| Value::Fixed)?,
            kind::BYTES => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.rest = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_specification() {
        // Its own examples: field 1 = 150, field 2 = "testing", and -2 as ten bytes.
        assert_eq!(Message::default().int(1, 150).as_bytes(), [0x08, 0x96, 0x01]);
        let text = Message::default().text(2, "testing");
        assert_eq!(text.as_bytes(), b"\x12\x07testing");
        let negative = Message::default().int(1, -2);
        assert_eq!(negative.as_bytes()[1..], [254, 255, 255, 255, 255, 255, 255, 255, 255, 1]);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let inner = Message::default().int(20, i64::MAX).text(1, "Ä");
        let message = Message::default().ints(3, [0, -1, 300]).message(700, &inner);
        let fields: Option<Vec<_>> = Fields::new(message.as_bytes()).collect();
        let expected = [
            (3, Value::Int(0)),
            (3, Value::Int(u64::MAX)),
            (3, Value::Int(300)),
            (700, Value::Bytes(inner.as_bytes())),
        ];
        assert_eq!(fields.unwrap(), expected);
        let texts: Option<Vec<_>> = Fields::new(inner.as_bytes()).collect();
        assert_eq!(texts.unwrap()[1].1.text(), Some("Ä"));
    }

    #[test]
    fn what_is_no_message_ends_in_none() {
        let whole = Message::default().int(1, 300).text(2, "abc");
        let whole = whole.as_bytes();
        for len in 1..whole.len() {
            let cut: Vec<_> = Fields::new(&whole[..len]).collect();
            // The first field takes three bytes.
            assert_eq!(cut.last().unwrap().is_none(), len != 3, "{len}");
        }
        for bytes in [&[0xff; 11][..], &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], &[0x0b], &[0x0c]] {
            assert_eq!(Fields::new(bytes).last(), Some(None), "{bytes:?}");
        }
    }
}
