//! ONNX's messages (`onnx.proto` of the format): nodes, tensors and the model around them.

use std::collections::BTreeSet;

use super::wire::Message;

/// Element types, by the format's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ElementType {
    Float = 1,
    Uint8 = 2,
    Int8 = 3,
    Int64 = 7,
    Bool = 9,
    Float16 = 10,
    Bfloat16 = 16,
}

impl ElementType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Uint8 | Self::Int8 | Self::Bool => 1,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Float => 4,
            Self::Int64 => 8,
        }
    }
}

/// An attribute of a node.
pub(super) enum Attribute<'a> {
    Int(i64),
    Ints(&'a [i64]),
}

/// A dimension of an input or an output.
#[derive(Clone, Copy)]
pub(super) enum Dim<'a> {
    Fixed(usize),
    Named(&'a str),
}

/// The operators of ONNX Runtime that are not ONNX's.
pub(super) const MICROSOFT: &str = "com.microsoft";
/// The first version of ONNX's operators and of its format that has all that is used; ONNX Runtime 1.18 reads them.
const OPERATORS: i64 = 21;
const FORMAT: i64 = 10;

/// A graph as it grows.
#[derive(Default)]
pub(super) struct Graph {
    nodes: Vec<Message>,
    initializers: Vec<Message>,
    inputs: Vec<Message>,
    outputs: Vec<Message>,
    /// Of constants that are there.
    constants: BTreeSet<String>,
    /// What stands before the names of values.
    scope: String,
}

impl Graph {
    /// Names of values to come begin with `scope`.
    pub fn enter(&mut self, scope: impl Into<String>) {
        self.scope = scope.into();
    }

    fn push(
        &mut self,
        (domain, operator): (&str, &str),
        inputs: &[&str],
        outputs: &[String],
        attributes: &[(&str, Attribute)],
    ) {
        let attributes: Vec<Message> = attributes.iter().map(attribute).collect();
        let mut node = Message::default()
            .texts(1, inputs.iter().copied())
            .texts(2, outputs.iter().map(String::as_str))
            .text(3, &outputs[0])
            .text(4, operator)
            .messages(5, &attributes);
        if !domain.is_empty() {
            node = node.text(7, domain);
        }
        self.nodes.push(node);
    }

    /// A name for the output of the next node.
    fn fresh(&self, operator: &str) -> String {
        format!("{}/{operator}.{}", self.scope, self.nodes.len())
    }

    /// A node of ONNX's operator; the name of its output.
    pub fn node(&mut self, operator: &str, inputs: &[&str]) -> String {
        self.node_with(operator, inputs, &[])
    }

    /// [`node`](Self::node) with attributes.
    pub fn node_with(
        &mut self,
        operator: &str,
        inputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) -> String {
        self.node_of(("", operator), inputs, attributes)
    }

    /// [`node_with`](Self::node_with) of an operator in a domain.
    pub fn node_of(
        &mut self,
        operator: (&str, &str),
        inputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) -> String {
        let output = self.fresh(operator.1);
        self.push(operator, inputs, std::slice::from_ref(&output), attributes);
        output
    }

    /// Two halves of the last dimension.
    pub fn halves(&mut self, x: &str) -> [String; 2] {
        let name = self.fresh("Split");
        let halves = [format!("{name}.0"), format!("{name}.1")];
        let attributes = [("axis", Attribute::Int(-1)), ("num_outputs", Attribute::Int(2))];
        self.push(("", "Split"), &[x], &halves, &attributes);
        halves
    }

    /// A constant in the graph itself: its little-endian bytes.
    fn constant(&mut self, name: String, kind: ElementType, dims: &[usize], data: &[u8]) -> String {
        if self.constants.insert(name.clone()) {
            self.initializers.push(tensor(&name, kind, dims).bytes(9, data));
        }
        name
    }

    /// A number.
    pub fn float(&mut self, value: f32) -> String {
        self.named_float(format!("float.{value:e}"), value)
    }

    /// A number with a name of its own.
    pub fn named_float(&mut self, name: String, value: f32) -> String {
        self.constant(name, ElementType::Float, &[], &value.to_le_bytes())
    }

    /// A vector of numbers with a name of its own.
    pub fn floats(&mut self, name: &str, values: &[f32]) -> String {
        self.constant(
            name.into(),
            ElementType::Float,
            &[values.len()],
            bytemuck::cast_slice(values),
        )
    }

    /// A vector of integers, such as a shape.
    pub fn ints(&mut self, values: &[i64]) -> String {
        let name = values.iter().map(|value| format!(".{value}")).collect::<String>();
        let dims = [values.len()];
        self.constant(
            format!("ints{name}"),
            ElementType::Int64,
            &dims,
            bytemuck::cast_slice(values),
        )
    }

    /// An integer.
    pub fn int(&mut self, value: i64) -> String {
        self.constant(format!("int.{value}"), ElementType::Int64, &[], &value.to_le_bytes())
    }

    /// A tensor in another file.
    pub fn external(&mut self, name: &str, kind: ElementType, dims: &[usize], at: Place) {
        let entry = |key: &str, value: &str| Message::default().text(1, key).text(2, value);
        let entries = [
            entry("location", at.file),
            entry("offset", &at.offset.to_string()),
            entry("length", &at.bytes.to_string()),
        ];
        /// `TensorProto.DataLocation.EXTERNAL`
        const EXTERNAL: i64 = 1;
        let tensor = tensor(name, kind, dims).messages(13, &entries).int(14, EXTERNAL);
        self.initializers.push(tensor);
    }

    pub fn input(&mut self, name: &str, kind: ElementType, dims: &[Dim]) {
        self.inputs.push(value(name, kind, dims));
    }

    /// Calls the value `from` by the name that users know.
    pub fn output(&mut self, from: &str, name: &str, kind: ElementType, dims: &[Dim]) {
        self.push(("", "Identity"), &[from], &[name.into()], &[]);
        self.outputs.push(value(name, kind, dims));
    }

    /// The model, with entries of metadata.
    pub fn into_model(self, name: &str, metadata: &[(&str, String)]) -> Message {
        let graph = Message::default()
            .messages(1, &self.nodes)
            .text(2, name)
            .messages(5, &self.initializers)
            .messages(11, &self.inputs)
            .messages(12, &self.outputs);
        let operators = |domain: &str, version| Message::default().text(1, domain).int(2, version);
        let metadata: Vec<Message> = metadata
            .iter()
            .map(|(key, value)| Message::default().text(1, key).text(2, value))
            .collect();
        Message::default()
            .int(1, FORMAT)
            .text(2, "bitnet")
            .text(3, env!("CARGO_PKG_VERSION"))
            .message(7, &graph)
            .messages(8, &[operators("", OPERATORS), operators(MICROSOFT, 1)])
            .messages(14, &metadata)
    }
}

/// Where an external tensor lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    /// Name of the file, beside the model's.
    pub file: &'a str,
    pub offset: u64,
    pub bytes: u64,
}

fn attribute((name, value): &(&str, Attribute)) -> Message {
    /// `AttributeProto.AttributeType`
    const INT: i64 = 2;
    const INTS: i64 = 7;
    let message = Message::default().text(1, name);
    match value {
        Attribute::Int(value) => message.int(3, *value).int(20, INT),
        Attribute::Ints(values) => message.ints(8, values.iter().copied()).int(20, INTS),
    }
}

fn tensor(name: &str, kind: ElementType, dims: &[usize]) -> Message {
    let dims = dims.iter().map(|&dim| dim as i64);
    Message::default().ints(1, dims).int(2, kind as i64).text(8, name)
}

fn value(name: &str, kind: ElementType, dims: &[Dim]) -> Message {
    let dims: Vec<Message> = dims
        .iter()
        .map(|dim| match dim {
            Dim::Fixed(size) => Message::default().int(1, *size as i64),
            Dim::Named(name) => Message::default().text(2, name),
        })
        .collect();
    let shape = Message::default().messages(1, &dims);
    let tensor = Message::default().int(1, kind as i64).message(2, &shape);
    Message::default().text(1, name).message(2, &Message::default().message(1, &tensor))
}
