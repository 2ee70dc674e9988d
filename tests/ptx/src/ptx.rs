//! PTX as nvcc writes it: kernels of a module, their parameters, shared memory and instructions.
//!
//! From the PTX ISA. Not read: functions that are called, initialized variables, and debugging information. What is not
//! known is kept, and is an error where it is executed.

use std::collections::HashMap;

use crate::instruction::{Instruction, Names, decode};

/// A parameter of a kernel.
#[derive(Clone, Debug)]
pub struct Param {
    /// Of its first byte among all parameters.
    pub offset: usize,
    /// In bytes.
    pub size: usize,
}

/// A kernel.
pub struct Kernel {
    /// As the source has it.
    pub name: String,
    /// In the order of the declaration.
    pub params: Vec<Param>,
    /// All parameters together, in bytes.
    pub param_bytes: usize,
    /// Shared memory of a block, in bytes; what a launch adds lies behind it.
    pub shared_bytes: usize,
    /// Memory of a thread of its own, in bytes.
    pub local_bytes: usize,
    /// Registers of a thread.
    pub registers: usize,
    /// The most threads that a block may have, if the kernel says.
    pub most_threads: Option<u32>,
    /// Branches go to indices here.
    pub code: Vec<Instruction>,
}

/// The kernels of a module.
///
/// # Errors
/// A kernel that does not have PTX's form.
pub fn parse(source: &str) -> Result<Vec<Kernel>, String> {
    let text = without_comments(source);
    let mut kernels = Vec::new();
    for (at, _) in text.match_indices(".entry") {
        kernels.push(kernel(&text, at + ".entry".len())?);
    }
    Ok(kernels)
}

/// Comments as blanks, so that lines stay what they are.
fn without_comments(source: &str) -> String {
    let (mut text, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        let (before, comment) = rest.split_at(start);
        text.push_str(before);
        let end = match comment.starts_with("//") {
            true => comment.find('\n').unwrap_or(comment.len()),
            false => comment.find("*/").map_or(comment.len(), |end| end + 2),
        };
        text.extend(comment[..end].chars().filter(|c| *c == '\n'));
        rest = &comment[end..];
    }
    text + rest
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

fn kernel(text: &str, at: usize) -> Result<Kernel, String> {
    let line = line_of(text, at);
    let wrong = |what: &str| format!("line {line}: a kernel without {what}");
    let open = text[at..].find('(').ok_or_else(|| wrong("parameters"))? + at;
    let brace = text[open..].find('{').ok_or_else(|| wrong("instructions"))? + open;
    let close = text[open..brace].find(')').ok_or_else(|| wrong("an end of parameters"))? + open;
    let name = text[at..open].trim().to_owned();
    let mut names = Names::default();
    let (mut params, mut param_bytes) = (Vec::new(), 0usize);
    for declaration in text[open + 1..close].split(',').map(str::trim).filter(|d| !d.is_empty()) {
        let variable = Variable::new(declaration).ok_or_else(|| wrong("sizes of parameters"))?;
        let offset = param_bytes.next_multiple_of(variable.align);
        names.symbols.insert(variable.name.to_owned(), offset as u64);
        params.push(Param { offset, size: variable.size });
        param_bytes = offset + variable.size;
    }
    let directive = |name: &str| {
        let (_, after) = text[close..brace].split_once(name)?;
        let threads = after.split(['.', '\n']).next()?.split(',');
        threads.map(|n| n.trim().parse::<u32>().ok()).product::<Option<u32>>()
    };
    let most_threads = directive(".maxntid").or_else(|| directive(".reqntid"));

    let (statements, labels) = statements(text, brace + 1);
    names.labels = labels;
    let (mut shared_bytes, mut local_bytes, mut code) = (0usize, 0usize, Vec::new());
    for statement in &statements {
        let declared = |after: &str, bytes: &mut usize, names: &mut Names| {
            let variable = Variable::new(after)?;
            let offset = bytes.next_multiple_of(variable.align);
            names.symbols.insert(variable.name.to_owned(), offset as u64);
            *bytes = offset + variable.size;
            Some(())
        };
        if let Some(after) = statement.text.strip_prefix(".shared") {
            declared(after, &mut shared_bytes, &mut names).ok_or_else(|| wrong("sizes"))?;
        } else if let Some(after) = statement.text.strip_prefix(".local") {
            declared(after, &mut local_bytes, &mut names).ok_or_else(|| wrong("sizes"))?;
        }
    }
    for statement in statements {
        if !statement.text.starts_with('.') {
            code.push(decode(&statement.text, statement.line, &mut names));
        } else {
            // A place for what labels count.
            code.push(Instruction::nothing(statement.line));
        }
    }
    code.push(decode("ret", line_of(text, brace), &mut names));
    let registers = names.registers();
    Ok(Kernel {
        name,
        params,
        param_bytes,
        shared_bytes,
        local_bytes,
        registers,
        most_threads,
        code,
    })
}

/// `.align 4 .b8 name[64]`, or `.param .u64 name`.
struct Variable<'a> {
    name: &'a str,
    size: usize,
    align: usize,
}

impl<'a> Variable<'a> {
    fn new(declaration: &'a str) -> Option<Self> {
        let (mut align, mut element, mut name) = (1, 1, "");
        let mut words = declaration.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                ".align" => align = words.next()?.parse().ok()?,
                ".param" | ".ptr" | ".global" => {}
                _ if word.starts_with('.') => {
                    let bits: usize =
                        word.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().ok()?;
                    element = bits / 8;
                }
                _ => name = word,
            }
        }
        let (name, count) = match name.split_once('[') {
            Some((name, count)) => (name, count.strip_suffix(']')?.parse().ok()?),
            None => (name, 1),
        };
        Some(Self { name, size: element * count, align: align.max(element) })
    }
}

struct Statement {
    text: String,
    line: usize,
}

/// Statements up to the brace that ends a body, and the statement that each label is before.
fn statements(text: &str, start: usize) -> (Vec<Statement>, HashMap<String, usize>) {
    let (mut statements, mut labels) = (Vec::new(), HashMap::new());
    let (mut current, mut depth, mut vector, mut line) =
        (String::new(), 1, false, line_of(text, start));
    for c in text[start..].chars() {
        line += usize::from(c == '\n');
        match c {
            '{' if current.trim().is_empty() => depth += 1,
            '{' => {
                vector = true;
                current.push(c);
            }
            '}' if vector => {
                vector = false;
                current.push(c);
            }
            '}' => {
                depth -= 1;
                current.clear();
                if depth == 0 {
                    break;
                }
            }
            ';' => {
                let text = current.split_whitespace().collect::<Vec<_>>().join(" ");
                current.clear();
                if !text.is_empty() {
                    statements.push(Statement { text, line });
                }
            }
            ':' => {
                labels.insert(current.trim().to_owned(), statements.len());
                current.clear();
            }
            // `.pragma "nounroll"` ends in a semicolon like the rest, and so do all declarations.
            _ => current.push(c),
        }
    }
    (statements, labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_their_parameters_and_memory() {
        let source = "
            .version 9.4
            .visible .entry add( // a comment
                .param .u32 add_param_0,
                .param .align 8 .b8 add_param_1[20],
                .param .u64 add_param_2
            )
            .maxntid 128, 2, 1
            {
                .reg .b32 %r<2>;
                .shared .align 16 .b8 tile[40];
                ld.param.v2.u32 {%r1, %r2}, [add_param_1+8]; @!%p1 bra $end;
            $end:
                ret;
            }";
        let kernels = parse(source).expect("a kernel");
        let [kernel] = kernels.as_slice() else { panic!("one kernel") };
        let offsets = Vec::from_iter(kernel.params.iter().map(|p| (p.offset, p.size)));
        assert_eq!(offsets, [(0, 4), (8, 20), (32, 8)]);
        assert_eq!(
            (kernel.name.as_str(), kernel.shared_bytes, kernel.param_bytes),
            ("add", 40, 40)
        );
        assert_eq!(kernel.most_threads, Some(256));
    }
}
