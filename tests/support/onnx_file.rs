//! ONNX files as their specification has them (`onnx.proto`), read without the library.

use std::{collections::HashMap, fs, path::Path};

/// Values of any element type; f64 holds all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array {
    pub dims: Vec<usize>,
    pub data: Vec<f64>,
}

impl Array {
    pub fn new(dims: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(dims.iter().product::<usize>(), data.len(), "{dims:?}");
        Self { dims: dims.to_vec(), data }
    }
}

/// A node with its attributes.
#[derive(Debug, Default)]
pub struct Node {
    pub operator: String,
    pub domain: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub ints: HashMap<String, Vec<i64>>,
}

/// A constant and where it lies.
#[derive(Debug, Default)]
pub struct Constant {
    pub element_type: u64,
    pub dims: Vec<usize>,
    /// Its bytes, in the file or in the one beside it.
    pub data: Vec<u8>,
    /// Offset and length there.
    pub external: Option<(usize, usize)>,
}

/// A whole model.
#[derive(Debug, Default)]
pub struct File {
    pub nodes: Vec<Node>,
    pub constants: HashMap<String, Constant>,
    /// Names, element types and dimensions.
    pub inputs: Vec<(String, u64, Vec<String>)>,
    pub outputs: Vec<(String, u64, Vec<String>)>,
    pub operators: Vec<(String, u64)>,
}

enum Field<'a> {
    Int(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn int(self) -> u64 {
        match self {
            Self::Int(value) => value,
            Self::Bytes(_) => panic!("bytes where an integer is expected"),
        }
    }

    fn bytes(self) -> &'a [u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Int(_) => panic!("an integer where bytes are expected"),
        }
    }

    fn text(self) -> String {
        String::from_utf8(self.bytes().to_vec()).unwrap()
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let len = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
    let (number, rest) = bytes.split_at(len);
    *bytes = rest;
    number.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Int(varint(&mut bytes)),
            2 => {
                let len = varint(&mut bytes) as usize;
                let (field, rest) = bytes.split_at(len);
                bytes = rest;
                Field::Bytes(field)
            }
            kind => panic!("a field of kind {kind}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

fn texts(bytes: &[u8]) -> HashMap<u64, String> {
    fields(bytes)
        .into_iter()
        .filter_map(|(number, field)| match field {
            Field::Bytes(bytes) => Some((number, String::from_utf8(bytes.to_vec()).ok()?)),
            Field::Int(_) => None,
        })
        .collect()
}

fn node(bytes: &[u8]) -> Node {
    let mut node = Node::default();
    for (number, field) in fields(bytes) {
        match number {
            1 => node.inputs.push(field.text()),
            2 => node.outputs.push(field.text()),
            3 => {}
            4 => node.operator = field.text(),
            5 => {
                let (mut name, mut values) = (String::new(), Vec::new());
                for (number, field) in fields(field.bytes()) {
                    match number {
                        1 => name = field.text(),
                        3 | 8 => values.push(field.int() as i64),
                        20 => assert!(matches!(field.int(), 2 | 7)),
                        _ => panic!("attribute field {number}"),
                    }
                }
                node.ints.insert(name, values);
            }
            7 => node.domain = field.text(),
            _ => panic!("node field {number}"),
        }
    }
    node
}

fn constant(bytes: &[u8], beside: &[u8], data_name: &str) -> (String, Constant) {
    let (mut name, mut constant, mut entries) = (String::new(), Constant::default(), vec![]);
    let mut is_external = false;
    for (number, field) in fields(bytes) {
        match number {
            1 => constant.dims.push(field.int() as usize),
            2 => constant.element_type = field.int(),
            8 => name = field.text(),
            9 => constant.data = field.bytes().to_vec(),
            13 => entries.push(texts(field.bytes())),
            14 => is_external = field.int() == 1,
            _ => panic!("tensor field {number}"),
        }
    }
    if is_external {
        let entry = |key: &str| &entries.iter().find(|entry| entry[&1] == key).unwrap()[&2];
        assert_eq!(entry("location"), data_name);
        let (offset, length) = (entry("offset").parse().unwrap(), entry("length").parse().unwrap());
        constant.external = Some((offset, length));
        constant.data = beside[offset..offset + length].to_vec();
    }
    (name, constant)
}

fn value(bytes: &[u8]) -> (String, u64, Vec<String>) {
    let (mut name, mut element_type, mut dims) = (String::new(), 0, vec![]);
    for (number, field) in fields(bytes) {
        match number {
            1 => name = field.text(),
            _ => {
                let tensor = fields(field.bytes()).remove(0).1.bytes();
                for (number, field) in fields(tensor) {
                    match number {
                        1 => element_type = field.int(),
                        _ => dims.extend(fields(field.bytes()).into_iter().map(|(_, dim)| {
                            match fields(dim.bytes()).remove(0) {
                                (1, size) => size.int().to_string(),
                                (_, name) => name.text(),
                            }
                        })),
                    }
                }
            }
        }
    }
    (name, element_type, dims)
}

impl File {
    pub fn read(path: &Path) -> Self {
        let (bytes, data) = (fs::read(path).unwrap(), path.with_extension("onnx.data"));
        let beside = fs::read(&data).unwrap();
        let data_name = data.file_name().unwrap().to_str().unwrap();
        let mut file = Self::default();
        for (number, field) in fields(&bytes) {
            match number {
                7 => {
                    for (number, field) in fields(field.bytes()) {
                        match number {
                            1 => file.nodes.push(node(field.bytes())),
                            2 => {}
                            5 => {
                                let (name, constant) = constant(field.bytes(), &beside, data_name);
                                assert!(file.constants.insert(name, constant).is_none());
                            }
                            11 => file.inputs.push(value(field.bytes())),
                            12 => file.outputs.push(value(field.bytes())),
                            _ => panic!("graph field {number}"),
                        }
                    }
                }
                8 => {
                    let (mut domain, mut version) = (String::new(), 0);
                    for (number, field) in fields(field.bytes()) {
                        match number {
                            1 => domain = field.text(),
                            _ => version = field.int(),
                        }
                    }
                    file.operators.push((domain, version));
                }
                _ => {}
            }
        }
        file
    }
}

impl Constant {
    pub fn array(&self) -> Array {
        let bytes = &self.data[..];
        let wide = |number: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(number)) << 16);
        let data = match self.element_type {
            1 => bytes.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
            2 => bytes.iter().map(|byte| f64::from(*byte)).collect(),
            3 => bytes.iter().map(|byte| f64::from(*byte as i8)).collect(),
            7 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            10 => {
                bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f64()).collect()
            }
            16 => bytes.as_chunks().0.iter().map(|b| f64::from(wide(*b))).collect(),
            kind => panic!("element type {kind}"),
        };
        Array::new(&self.dims, data)
    }
}
