//! Reads a formula in LaTeX: numbers, fractions, roots, powers, products, sums, variables.

use super::value::Value;

/// How `3\frac{1}{2}` is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixed {
    /// As 3 + 1/2.
    Sum,
    /// Not at all: it may be a product.
    Refused,
}

/// Names of Greek letters, which are variables; π is one that is a constant.
const GREEK: [&str; 14] = [
    "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "pi", "rho", "sigma",
    "tau", "phi", "omega",
];
/// Functions of which nothing is known.
const FUNCTIONS: [&str; 9] = ["sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "arctan"];
/// Commands that only space, or only make something large.
const IGNORED: [&str; 11] = [
    "left",
    "right",
    "displaystyle",
    "textstyle",
    "quad",
    "qquad",
    "big",
    "Big",
    "bigl",
    "bigr",
    "limits",
];
/// Brackets in brackets.
const DEPTH: usize = 32;

/// The value of a formula; `None` if it is something else.
pub fn parse(text: &str, mixed: Mixed) -> Option<Value> {
    let tokens = tokens(text)?;
    let mut parser = Parser { tokens: &tokens, at: 0, mixed, depth: 0 };
    let value = parser.sum()?;
    (parser.at == tokens.len()).then_some(value)
}

/// A piece of a formula.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// Digits, with a point among them at most.
    Number(String),
    Letter(char),
    Command(String),
    Sign(char),
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim();
    while let Some(c) = rest.chars().next() {
        let command = rest.strip_prefix('\\');
        let name = command.map(|rest| rest.split(|c: char| !c.is_ascii_alphabetic()).next());
        let len = match (c, name) {
            ('0'..='9' | '.', _) => {
                let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.');
                let number = &rest[..end.unwrap_or(rest.len())];
                tokens.push(Token::Number(number.into()));
                number.len()
            }
            ('\\', Some(Some(name))) if !name.is_empty() => {
                if !IGNORED.contains(&name) {
                    tokens.push(Token::Command(name.into()));
                }
                1 + name.len()
            }
            // \, \; \: \! and a space behind a backslash only space.
            ('\\', _) => match rest[1..].chars().next()? {
                ',' | ';' | ':' | '!' | ' ' => 2,
                _ => return None,
            },
            ('a'..='z' | 'A'..='Z', _) => {
                let word = rest.split(|c: char| !c.is_ascii_alphabetic()).next()?;
                // A word is no product of its letters.
                let is_word =
                    word.len() > 3 || (word.len() == 3 && !["xyz", "abc"].contains(&word));
                if is_word {
                    return None;
                }
                tokens.extend(word.chars().map(Token::Letter));
                word.len()
            }
            (
                '+' | '-' | '*' | '/' | '^' | '_' | '(' | ')' | '[' | ']' | '{' | '}' | '!' | '|',
                _,
            ) => {
                tokens.push(Token::Sign(c));
                1
            }
            ('−', _) => {
                tokens.push(Token::Sign('-'));
                c.len_utf8()
            }
            (' ' | '~' | '$', _) => 1,
            _ => return None,
        };
        rest = &rest[len..];
    }
    Some(tokens)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    mixed: Mixed,
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn takes_sign(&mut self, sign: char) -> bool {
        let is_there = self.peek() == Some(&Token::Sign(sign));
        self.at += usize::from(is_there);
        is_there
    }

    fn takes_command(&mut self, names: &[&str]) -> bool {
        let is_there =
            matches!(self.peek(), Some(Token::Command(name)) if names.contains(&&name[..]));
        self.at += usize::from(is_there);
        is_there
    }

    fn sum(&mut self) -> Option<Value> {
        // The same unknown sign wherever it stands.
        let either = Value::symbol("\\pm");
        let mut sum = match self.takes_command(&["pm"]) {
            true => either.times(&self.product()?)?,
            false => self.product()?,
        };
        loop {
            if self.takes_command(&["pm"]) {
                sum = sum.plus(&either.times(&self.product()?)?)?;
            } else if self.takes_sign('+') {
                sum = sum.plus(&self.product()?)?;
            } else if self.takes_sign('-') {
                sum = sum.plus(&(-&self.product()?)?)?;
            } else {
                return Some(sum);
            }
        }
    }

    fn product(&mut self) -> Option<Value> {
        let mut is_negative = false;
        while let Some(Token::Sign(sign @ ('+' | '-'))) = self.peek() {
            is_negative ^= *sign == '-';
            self.at += 1;
        }
        let product = self.unsigned_product()?;
        if is_negative { -&product } else { Some(product) }
    }

    fn unsigned_product(&mut self) -> Option<Value> {
        let (mut product, mut was_number) = self.factor()?;
        loop {
            if self.takes_sign('*') || self.takes_command(&["cdot", "times"]) {
                product = product.times(&self.signed()?)?;
                was_number = false;
            } else if self.takes_sign('/') || self.takes_command(&["div"]) {
                product = product.over(&self.signed()?)?;
                was_number = false;
            } else if self.begins_factor() {
                let is_fraction = self.is_fraction();
                // Two numbers side by side are no product.
                if matches!(self.peek(), Some(Token::Number(_))) {
                    return None;
                }
                let (factor, _) = self.factor()?;
                product = match (was_number && is_fraction, self.mixed) {
                    (false, _) => product.times(&factor)?,
                    (true, Mixed::Sum) => product.plus(&factor)?,
                    (true, Mixed::Refused) => return None,
                };
                was_number = false;
            } else {
                return Some(product);
            }
        }
    }

    /// A factor that may have a sign, behind a sign of multiplication.
    fn signed(&mut self) -> Option<Value> {
        if self.takes_sign('-') { -&self.factor()?.0 } else { Some(self.factor()?.0) }
    }

    /// Whether a fraction of whole numbers follows, as in a mixed number.
    fn is_fraction(&self) -> bool {
        let open = Token::Sign('{');
        let is_whole =
            |token: &Token| matches!(token, Token::Number(digits) if !digits.contains('.'));
        match &self.tokens[self.at..] {
            [Token::Command(name), a, numerator, _, b, denominator, ..] => {
                name.ends_with("frac")
                    && [a, b] == [&open; 2]
                    && is_whole(numerator)
                    && is_whole(denominator)
            }
            _ => false,
        }
    }

    fn begins_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Number(_) | Token::Letter(_)) => true,
            Some(Token::Sign(sign)) => ['(', '[', '{'].contains(sign),
            Some(Token::Command(name)) => !["cdot", "times", "div", "pm"].contains(&&name[..]),
            None => false,
        }
    }

    /// With its power; and whether it is a whole number as it is written.
    fn factor(&mut self) -> Option<(Value, bool)> {
        let is_whole = matches!(self.peek(), Some(Token::Number(digits)) if !digits.contains('.'));
        let mut value = self.atom()?;
        let mut is_whole_number = is_whole;
        while self.takes_sign('!') {
            value = factorial(&value)?;
            is_whole_number = false;
        }
        if self.takes_sign('^') {
            let exponent = self.argument()?;
            value = value.to_power(&exponent)?;
            is_whole_number = false;
            if self.peek() == Some(&Token::Sign('^')) || self.peek() == Some(&Token::Sign('!')) {
                return None;
            }
        }
        Some((value, is_whole_number))
    }

    /// What follows a command, `^` or `_`: a group, or one digit, letter or command.
    fn argument(&mut self) -> Option<Value> {
        match self.peek()?.clone() {
            Token::Sign('{') => self.atom(),
            Token::Number(digits) => {
                // Only the first digit belongs to it; in normal forms nothing follows.
                self.at += 1;
                if digits.len() == 1 { number(&digits) } else { None }
            }
            Token::Letter(letter) => {
                self.at += 1;
                Some(Value::symbol(&letter.to_string()))
            }
            Token::Command(name) if GREEK.contains(&&name[..]) => self.atom(),
            _ => None,
        }
    }

    fn group(&mut self, end: char) -> Option<Value> {
        self.depth += 1;
        if self.depth > DEPTH {
            return None;
        }
        let value = self.sum()?;
        self.depth -= 1;
        self.takes_sign(end).then_some(value)
    }

    fn atom(&mut self) -> Option<Value> {
        let token = self.peek()?.clone();
        self.at += 1;
        match token {
            Token::Number(digits) => number(&digits),
            Token::Letter(letter) => match self.takes_sign('_') {
                true => self.indexed(letter),
                false => Some(Value::symbol(&letter.to_string())),
            },
            Token::Sign('(') => self.group(')'),
            Token::Sign('[') => self.group(']'),
            Token::Sign('{') => self.group('}'),
            Token::Sign(_) => None,
            Token::Command(name) => self.command(&name),
        }
    }

    /// `x_1` is another variable than `x`.
    fn indexed(&mut self, letter: char) -> Option<Value> {
        let begin = self.at;
        self.argument()?;
        Some(Value::symbol(&format!("{letter}_{:?}", &self.tokens[begin..self.at])))
    }

    fn command(&mut self, name: &str) -> Option<Value> {
        match name {
            "frac" | "dfrac" | "tfrac" => {
                let numerator = self.argument()?;
                numerator.over(&self.argument()?)
            }
            "sqrt" => {
                let degree = match self.takes_sign('[') {
                    true => self.group(']')?.as_integer()?,
                    false => 2,
                };
                self.argument()?.root(u32::try_from(degree).ok()?)
            }
            "binom" | "dbinom" | "tbinom" => {
                let n = self.argument()?.as_integer()?;
                binomial(n, self.argument()?.as_integer()?)
            }
            _ if GREEK.contains(&name) => Some(Value::symbol(&format!("\\{name}"))),
            _ if FUNCTIONS.contains(&name) => {
                // Where an argument without brackets ends, nobody says.
                if !matches!(self.peek(), Some(Token::Sign('(' | '{'))) {
                    return None;
                }
                Value::unknown(&format!("\\{name}"), &[&self.atom()?])
            }
            _ => None,
        }
    }
}

/// `12`, `0.5`, `.5`.
fn number(digits: &str) -> Option<Value> {
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let places = u32::try_from(part.len()).ok()?;
    if (whole.is_empty() && part.is_empty()) || part.contains('.') {
        return None;
    }
    let all = format!("{whole}{part}").parse().ok()?;
    Value::fraction(all, 10i128.checked_pow(places)?)
}

fn factorial(value: &Value) -> Option<Value> {
    let n = value.as_integer().filter(|n| (0..=33).contains(n))?; // 34! is more than 2¹²⁷
    Value::fraction((1..=n).product(), 1)
}

fn binomial(n: i128, k: i128) -> Option<Value> {
    if !(0..=n).contains(&k) || n > 1000 {
        return None;
    }
    let mut value = 1i128;
    for i in 0..k.min(n - k) {
        value = value.checked_mul(n - i)? / (i + 1);
    }
    Value::fraction(value, 1)
}
