//! One instruction: what it reads, what it writes, and what it does.

use std::collections::HashMap;

use crate::operation::{Function, function};

/// Where a register's value is in a thread.
pub type Register = usize;

/// Which of a thread's coordinates a special register holds.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // named as in PTX
pub enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
}

/// What an instruction reads.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)] // by their names
pub enum Source {
    Register(Register),
    Immediate(u64),
    Special(Special),
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // named as in PTX
pub enum Space {
    Param,
    Global,
    Shared,
    Local,
}

/// An access to memory.
#[derive(Clone, Debug)]
pub struct Access {
    /// Of the address.
    pub space: Space,
    /// Address without the offset.
    pub base: Source,
    /// Added to it.
    pub offset: i64,
    /// Bytes of an element.
    pub size: usize,
    /// Whether a loaded element keeps its sign.
    pub signed: bool,
}

/// How lanes find each other: modes of `shfl.sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // named as in PTX
pub enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

/// What an instruction does.
pub enum Operation {
    /// From registers to a register.
    Compute(Function, Option<Register>, Vec<Source>),
    /// Several values in one: `mov.b32 %r, {low, high}`, each of so many bits.
    Pack(Register, Vec<Source>, u32),
    /// One value in several; `_` drops a part.
    Unpack(Vec<Option<Register>>, Source, u32),
    /// A register each, from memory.
    Load(Access, Vec<Register>),
    /// To memory.
    Store(Access, Vec<Source>),
    /// To an index of the code.
    Branch(usize),
    /// Ends the thread.
    Return,
    /// Waits for all threads of the block.
    Barrier,
    /// Waits for the lanes of a mask.
    WarpBarrier(Source),
    /// A value of another lane: to, whether there is one, mode, [value, lane, limits, mask].
    Shuffle(Register, Option<Register>, Shuffle, [Source; 4]),
    /// A matrix product of int8, all lanes together: whether it is m16n8k32 or m8n8k16; d, [a, b, c].
    Multiply(bool, Vec<Register>, [Vec<Source>; 3]),
    /// Nothing.
    Nothing,
    /// An instruction that is not known.
    Unknown(String),
}

/// An instruction of a kernel.
pub struct Instruction {
    /// The predicate under which it is carried out, or, `true`, under which it is not.
    pub guard: Option<(Register, bool)>,
    /// What it does.
    pub operation: Operation,
    /// In the PTX.
    pub line: usize,
}

impl Instruction {
    /// One that does nothing.
    pub fn nothing(line: usize) -> Self {
        Self { guard: None, operation: Operation::Nothing, line }
    }
}

/// What names stand for in a kernel.
#[derive(Default)]
pub struct Names {
    registers: HashMap<String, Register>,
    /// Offsets of parameters and variables.
    pub symbols: HashMap<String, u64>,
    /// Statements behind labels.
    pub labels: HashMap<String, usize>,
}

impl Names {
    /// How many registers there are.
    pub fn registers(&self) -> usize {
        self.registers.len()
    }

    fn register(&mut self, name: &str) -> Register {
        let next = self.registers.len();
        *self.registers.entry(name.to_owned()).or_insert(next)
    }

    fn source(&mut self, text: &str) -> Option<Source> {
        if let Some(special) = special(text) {
            return Some(Source::Special(special));
        }
        if let Some(offset) = self.symbols.get(text) {
            return Some(Source::Immediate(*offset));
        }
        if let Some(bits) = number(text) {
            return Some(Source::Immediate(bits));
        }
        let name = text.starts_with(|c: char| c == '%' || c == '_' || c.is_alphabetic());
        name.then(|| Source::Register(self.register(text)))
    }

    fn sources(&mut self, text: &str) -> Option<Vec<Source>> {
        elements(text).map(|element| self.source(element)).collect()
    }
}

fn special(text: &str) -> Option<Special> {
    let axis = |text: &str| "xyz".find(text).filter(|_| text.len() == 1);
    let (name, of) = text.split_once('.').unwrap_or((text, "x"));
    Some(match name {
        "%tid" => Special::Tid(axis(of)?),
        "%ntid" => Special::Ntid(axis(of)?),
        "%ctaid" => Special::Ctaid(axis(of)?),
        "%nctaid" => Special::Nctaid(axis(of)?),
        "%laneid" => Special::Lane,
        _ => return None,
    })
}

/// `12`, `-1`, `0x1F`, `0f3F800000` or `0d3FF0000000000000`.
fn number(text: &str) -> Option<u64> {
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    match text.get(..2) {
        Some("0f" | "0F" | "0d" | "0D" | "0x" | "0X") => hex(text[2..].trim_end_matches('U')),
        _ => text.parse::<i128>().ok().map(|x| x as u64),
    }
}

/// What is in the braces, or all of it.
fn elements(text: &str) -> impl Iterator<Item = &str> {
    text.trim_start_matches('{').trim_end_matches('}').split(',').map(str::trim)
}

/// Operands, at the commas outside of braces.
fn operands(text: &str) -> Vec<&str> {
    let mut inside = false;
    let commas = text.split(|c| {
        inside = c == '{' || inside && c != '}';
        c == ',' && !inside
    });
    commas.map(str::trim).filter(|operand| !operand.is_empty()).collect()
}

/// A statement as an instruction.
pub fn decode(statement: &str, line: usize, names: &mut Names) -> Instruction {
    let (guard, rest) = match statement.strip_prefix('@').and_then(|rest| rest.split_once(' ')) {
        Some((predicate, rest)) => {
            let name = predicate.trim_start_matches('!');
            (Some((names.register(name), name != predicate)), rest)
        }
        None => (None, statement),
    };
    let (mnemonic, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let operation = operation(mnemonic, &operands(rest), names);
    let operation = operation.unwrap_or_else(|| Operation::Unknown(statement.to_owned()));
    Instruction { guard, operation, line }
}

fn operation(mnemonic: &str, operands: &[&str], names: &mut Names) -> Option<Operation> {
    let parts = Vec::from_iter(mnemonic.split('.'));
    Some(match (parts.as_slice(), operands) {
        (["ret" | "exit"], _) => Operation::Return,
        (["bra", ..], [label]) => Operation::Branch(*names.labels.get(*label)?),
        (["bar" | "barrier", "sync", ..], ["0"]) => Operation::Barrier,
        (["bar", "warp", "sync"], [mask]) => Operation::WarpBarrier(names.source(mask)?),
        (["ld", modifiers @ .., kind], [to, address]) => {
            let registers = elements(to).map(|name| names.register(name)).collect();
            Operation::Load(access(modifiers, kind, address, names)?, registers)
        }
        (["st", modifiers @ .., kind], [address, from]) => {
            Operation::Store(access(modifiers, kind, address, names)?, names.sources(from)?)
        }
        (["shfl", "sync", mode, "b32"], [to, value, lane, limits, mask]) => {
            let mode = match *mode {
                "up" => Shuffle::Up,
                "down" => Shuffle::Down,
                "bfly" => Shuffle::Butterfly,
                _ => Shuffle::Index,
            };
            let (to, found) =
                to.split_once('|').map_or((*to, None), |(to, found)| (to, Some(found)));
            let found = found.map(|name| names.register(name));
            let sources = [value, lane, limits, mask].map(|text| names.source(text));
            let [Some(value), Some(lane), Some(limits), Some(mask)] = sources else { return None };
            Operation::Shuffle(names.register(to), found, mode, [value, lane, limits, mask])
        }
        (
            ["mma", "sync", "aligned", shape, "row", "col", "s32", "s8", "s8", "s32"],
            [d, a, b, c],
        ) => {
            let wide = match *shape {
                "m16n8k32" => true,
                "m8n8k16" => false,
                _ => return None,
            };
            let to = elements(d).map(|name| names.register(name)).collect();
            Operation::Multiply(wide, to, [names.sources(a)?, names.sources(b)?, names.sources(c)?])
        }
        (["mov", kind], [to, from]) if from.starts_with('{') => {
            let from = names.sources(from)?;
            let bits = bits(kind)? / from.len() as u32;
            Operation::Pack(names.register(to), from, bits)
        }
        (["mov", kind], [to, from]) if to.starts_with('{') => {
            let to = elements(to).map(|name| (name != "_").then(|| names.register(name)));
            let to = Vec::from_iter(to);
            let bits = bits(kind)? / to.len() as u32;
            Operation::Unpack(to, names.source(from)?, bits)
        }
        (_, [to, from @ ..]) => {
            let from = from.iter().map(|text| names.source(text)).collect::<Option<Vec<_>>>()?;
            let function = function(mnemonic)?;
            let takes = match function {
                Function::One(_) => 1,
                Function::Two(_) => 2,
                Function::Three(_) => 3,
                Function::Four(_) => 4,
            };
            if takes != from.len() || to.contains('|') {
                return None;
            }
            Operation::Compute(function, (*to != "_").then(|| names.register(to)), from)
        }
        _ => return None,
    })
}

fn bits(kind: &str) -> Option<u32> {
    kind.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}

fn access(modifiers: &[&str], kind: &str, address: &str, names: &mut Names) -> Option<Access> {
    // `nc` and `v4` do not change what is read where: the registers are counted. Volatile and atomic accesses are not known.
    let space = match *modifiers.first()? {
        "param" => Space::Param,
        "global" => Space::Global,
        "shared" => Space::Shared,
        "local" => Space::Local,
        _ => return None,
    };
    if !modifiers[1..].iter().all(|modifier| matches!(*modifier, "nc" | "v2" | "v4")) {
        return None;
    }
    let address = address.strip_prefix('[')?.strip_suffix(']')?;
    let (base, offset) = match address.split_once('+') {
        Some((base, offset)) => (base, offset.parse().ok()?),
        None => (address, 0),
    };
    let signed = kind.starts_with('s');
    Some(Access {
        space,
        base: names.source(base)?,
        offset,
        size: bits(kind)? as usize / 8,
        signed,
    })
}
