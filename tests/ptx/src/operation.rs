//! Instructions that compute from registers alone, as functions of their bits.
//!
//! A register holds 64 bits. A narrower value is in the low ones, and what is above them is never read; a predicate is bit 0.

use crate::float::{from_bf16, from_f16, to_bf16, to_f16};

/// What an instruction computes.
#[derive(Clone, Copy)]
#[allow(missing_docs)] // by the number of operands
pub enum Function {
    One(fn(u64) -> u64),
    Two(fn(u64, u64) -> u64),
    Three(fn(u64, u64, u64) -> u64),
    Four(fn(u64, u64, u64, u64) -> u64),
}
use Function::{Four, One, Three, Two};

/// A number in a register.
trait Value: Copy + PartialOrd + 'static {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

/// Integers, whose arithmetic wraps.
trait Integer: Value + Ord {
    const BITS: u32;
    fn plus(self, other: Self) -> Self;
    fn minus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    fn times_high(self, other: Self) -> Self;
    fn over(self, other: Self) -> Self;
    fn modulo(self, other: Self) -> Self;
    fn left(self, by: u32) -> Self;
    fn right(self, by: u32) -> Self;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn of(bits: u64) -> Self {
                bits as $type
            }
            fn bits(self) -> u64 {
                self as u64
            }
        }
        impl Integer for $type {
            const BITS: u32 = <$type>::BITS;
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            fn minus(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            fn times_high(self, other: Self) -> Self {
                ((self as i128 * other as i128) >> <$type>::BITS) as $type
            }
            // Quotients by zero are all ones on a device.
            fn over(self, other: Self) -> Self {
                if other == 0 { !0 } else { self.wrapping_div(other) }
            }
            fn modulo(self, other: Self) -> Self {
                if other == 0 { self } else { self.wrapping_rem(other) }
            }
            // Shifts by more than there are bits leave none, or signs.
            fn left(self, by: u32) -> Self {
                self.checked_shl(by).unwrap_or(0)
            }
            fn right(self, by: u32) -> Self {
                self >> by.min(<$type>::BITS - 1) >> u32::from(by >= <$type>::BITS)
            }
        }
    )*};
}
integers!(u8, i8, u16, i16, u32, i32, u64, i64);

macro_rules! floats {
    ($($type:ty, $bits:ty);*) => {$(
        impl Value for $type {
            fn of(bits: u64) -> Self {
                <$type>::from_bits(bits as $bits)
            }
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
    )*};
}
floats!(f32, u32; f64, u64);

fn two<T: Value>(f: fn(u64, u64) -> u64) -> Option<Function> {
    Some(Two(f))
}

/// `setp`: ordered comparisons, false with a NaN, and the unordered ones.
fn compare<T: Value>(how: &str) -> Option<Function> {
    match how {
        "eq" => two::<T>(|a, b| (T::of(a) == T::of(b)).into()),
        "ne" => two::<T>(|a, b| {
            T::of(a).partial_cmp(&T::of(b)).is_some_and(|order| order.is_ne()).into()
        }),
        "lt" | "lo" => two::<T>(|a, b| (T::of(a) < T::of(b)).into()),
        "le" | "ls" => two::<T>(|a, b| (T::of(a) <= T::of(b)).into()),
        "gt" | "hi" => two::<T>(|a, b| (T::of(a) > T::of(b)).into()),
        "ge" | "hs" => two::<T>(|a, b| (T::of(a) >= T::of(b)).into()),
        "equ" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none_or(|o| o.is_eq()).into()),
        "neu" => two::<T>(|a, b| (T::of(a) != T::of(b)).into()),
        "ltu" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none_or(|o| o.is_lt()).into()),
        "leu" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none_or(|o| o.is_le()).into()),
        "gtu" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none_or(|o| o.is_gt()).into()),
        "geu" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none_or(|o| o.is_ge()).into()),
        "nan" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_none().into()),
        "num" => two::<T>(|a, b| T::of(a).partial_cmp(&T::of(b)).is_some().into()),
        _ => None,
    }
}

fn integer<T: Integer>(operation: &str) -> Option<Function> {
    Some(match operation {
        "add" => Two(|a, b| T::of(a).plus(T::of(b)).bits()),
        "sub" => Two(|a, b| T::of(a).minus(T::of(b)).bits()),
        "mul.lo" => Two(|a, b| T::of(a).times(T::of(b)).bits()),
        "mul.hi" => Two(|a, b| T::of(a).times_high(T::of(b)).bits()),
        "mad.lo" => Three(|a, b, c| T::of(a).times(T::of(b)).plus(T::of(c)).bits()),
        "div" => Two(|a, b| T::of(a).over(T::of(b)).bits()),
        "rem" => Two(|a, b| T::of(a).modulo(T::of(b)).bits()),
        "min" => Two(|a, b| T::of(a).min(T::of(b)).bits()),
        "max" => Two(|a, b| T::of(a).max(T::of(b)).bits()),
        "and" => Two(|a, b| a & b),
        "or" => Two(|a, b| a | b),
        "xor" => Two(|a, b| a ^ b),
        "not" => One(|a| !a),
        "neg" => One(|a| T::of(0).minus(T::of(a)).bits()),
        "abs" => One(|a| T::of(a).max(T::of(0).minus(T::of(a))).bits()),
        "shl" => Two(|a, b| T::of(a).left(b as u32).bits()),
        "shr" => Two(|a, b| T::of(a).right(b as u32).bits()),
        // Fields: `length` bits from `first` on, both of which count as bytes.
        "bfe" => Three(|a, first, length| {
            let (first, length) = (first as u8 as u32, length as u8 as u32);
            let above = T::BITS - length.min(T::BITS);
            T::of(a).right(first).left(above).right(above).bits()
        }),
        "bfi" => Four(|field, into, first, length| {
            let (first, length) = (first as u8 as u32, length as u8 as u32);
            let mask = 1u64.checked_shl(length).unwrap_or(0).wrapping_sub(1);
            let mask = mask.checked_shl(first).unwrap_or(0);
            into & !mask | field.checked_shl(first).unwrap_or(0) & mask
        }),
        "wide" => One(|a| T::of(a).bits()),
        _ => return None,
    })
}

macro_rules! float_operations {
    ($name:ident, $type:ty) => {
        fn $name(operation: &str) -> Option<Function> {
            fn of(bits: u64) -> $type {
                <$type>::of(bits)
            }
            /// The larger (or, negated, the smaller); the number, if the other is NaN; +0 is larger than −0.
            fn larger(a: $type, b: $type) -> $type {
                match a.partial_cmp(&b) {
                    Some(std::cmp::Ordering::Less) => b,
                    Some(std::cmp::Ordering::Equal) => {
                        if a.is_sign_positive() {
                            a
                        } else {
                            b
                        }
                    }
                    Some(_) => a,
                    None => {
                        if a.is_nan() {
                            b
                        } else {
                            a
                        }
                    }
                }
            }
            Some(match operation {
                "add" | "add.rn" => Two(|a, b| (of(a) + of(b)).bits()),
                "sub" | "sub.rn" => Two(|a, b| (of(a) - of(b)).bits()),
                "mul" | "mul.rn" => Two(|a, b| (of(a) * of(b)).bits()),
                "div.rn" => Two(|a, b| (of(a) / of(b)).bits()),
                "rcp.rn" => One(|a| (1. / of(a)).bits()),
                "sqrt.rn" => One(|a| of(a).sqrt().bits()),
                "fma.rn" => Three(|a, b, c| of(a).mul_add(of(b), of(c)).bits()),
                "neg" => One(|a| (-of(a)).bits()),
                "abs" => One(|a| of(a).abs().bits()),
                "max" => Two(|a, b| larger(of(a), of(b)).bits()),
                "min" => Two(|a, b| (-larger(-of(a), -of(b))).bits()),
                // From one of its own kind to a whole number.
                "rni" => One(|a| of(a).round_ties_even().bits()),
                "rmi" => One(|a| of(a).floor().bits()),
                "rpi" => One(|a| of(a).ceil().bits()),
                "rzi" => One(|a| of(a).trunc().bits()),
                _ => return None,
            })
        }
    };
}
float_operations!(single, f32);
float_operations!(double, f64);

/// Two bytes of `b:a`, or their signs, for each of four selectors.
fn permute(a: u64, b: u64, selectors: u64) -> u64 {
    let bytes = (b << 32 | a & 0xffff_ffff).to_le_bytes();
    let chosen = [0, 1, 2, 3].map(|i| {
        let selector = (selectors >> (4 * i)) as usize & 15;
        let byte = bytes[selector & 7];
        if selector & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 }
    });
    u32::from_le_bytes(chosen).into()
}

/// `c` + four products of signed bytes.
fn dot(a: u64, b: u64, c: u64) -> u64 {
    let bytes = |x: u64| (x as u32).to_le_bytes().map(|byte| i32::from(byte as i8));
    let products = bytes(a).into_iter().zip(bytes(b)).map(|(a, b)| a * b);
    u64::from(products.fold(c as i32, i32::wrapping_add) as u32)
}

/// `cvt`: to, from, and how it rounds (nothing, or that and `ftz`, `sat`, which are refused).
fn convert(rounding: &[&str], to: &str, from: &str) -> Option<Function> {
    // Conversions to integers saturate, and NaN becomes 0, as Rust's casts.
    macro_rules! to_integer {
        ($from:ty, $to:ty, $round:ident) => {
            One(|a| (<$from>::of(a).$round() as $to).bits())
        };
    }
    macro_rules! from_integer {
        ($from:ty) => {
            match to {
                "f32" => One(|a| (<$from>::of(a) as f32).bits()),
                "f64" => One(|a| (<$from>::of(a) as f64).bits()),
                "f16" => One(|a| to_f16(<$from>::of(a) as f32).into()),
                _ => One(|a| <$from>::of(a).bits()),
            }
        };
    }
    Some(match (rounding, to, from) {
        ([], "u8" | "s8" | "u16" | "s16" | "u32" | "s32" | "u64" | "s64", _)
        | (["rn"], "f32" | "f64", _)
            if from.starts_with(['u', 's']) =>
        {
            match from {
                "u8" => from_integer!(u8),
                "s8" => from_integer!(i8),
                "u16" => from_integer!(u16),
                "s16" => from_integer!(i16),
                "u32" => from_integer!(u32),
                "s32" => from_integer!(i32),
                "u64" => from_integer!(u64),
                _ => from_integer!(i64),
            }
        }
        ([how], "f32", "f32") => return single(how),
        ([how], "f64", "f64") => return double(how),
        (["rni"], "s32", "f32") => to_integer!(f32, i32, round_ties_even),
        (["rzi"], "s32", "f32") => to_integer!(f32, i32, trunc),
        (["rzi"], "u32", "f32") => to_integer!(f32, u32, trunc),
        (["rzi"], "s64", "f32") => to_integer!(f32, i64, trunc),
        (["rzi"], "u64", "f32") => to_integer!(f32, u64, trunc),
        (["rn"], "f32", "f64") => One(|a| (f64::of(a) as f32).bits()),
        ([], "f64", "f32") => One(|a| f64::from(f32::of(a)).bits()),
        ([], "f32", "f16") => One(|a| from_f16(a as u16).bits()),
        ([], "f32", "bf16") => One(|a| from_bf16(a as u16).bits()),
        (["rn"], "f16", "f32") => One(|a| to_f16(f32::of(a)).into()),
        (["rn"], "bf16", "f32") => One(|a| to_bf16(f32::of(a)).into()),
        _ => return None,
    })
}

/// The function of an instruction, `add.s32` for example; none for what is no such instruction, or is not known.
pub fn function(instruction: &str) -> Option<Function> {
    let parts = Vec::from_iter(instruction.split('.'));
    let (kind, head) = parts.split_last()?;
    match (head, *kind) {
        (["mov"] | ["cvta", ..], _) => return Some(One(|a| a)),
        (["selp"], _) => return Some(Three(|a, b, which| if which & 1 != 0 { a } else { b })),
        (["prmt"], "b32") => return Some(Three(permute)),
        (["dp4a", "s32"], "s32") => return Some(Three(dot)),
        (["mul", "wide"], "u32") => {
            return Some(Two(|a, b| u64::from(a as u32) * u64::from(b as u32)));
        }
        (["mul", "wide"], "s32") => {
            return Some(Two(|a, b| (i64::from(a as i32) * i64::from(b as i32)) as u64));
        }
        (["mul", "wide"], "u16") => {
            return Some(Two(|a, b| u64::from(a as u16) * u64::from(b as u16)));
        }
        (["mul", "wide"], "s16") => {
            return Some(Two(|a, b| (i32::from(a as i16) * i32::from(b as i16)) as u64));
        }
        (["mad", "wide"], "u32") => {
            return Some(Three(|a, b, c| {
                (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c)
            }));
        }
        (["mad", "wide"], "s32") => {
            return Some(Three(|a, b, c| {
                (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64
            }));
        }
        (["cvt", how @ .., to], from) => return convert(how, to, from),
        (["setp", how], "u16" | "b16") => return compare::<u16>(how),
        (["setp", how], "s16") => return compare::<i16>(how),
        (["setp", how], "u32" | "b32") => return compare::<u32>(how),
        (["setp", how], "s32") => return compare::<i32>(how),
        (["setp", how], "u64" | "b64") => return compare::<u64>(how),
        (["setp", how], "s64") => return compare::<i64>(how),
        (["setp", how], "f32") => return compare::<f32>(how),
        (["setp", how], "f64") => return compare::<f64>(how),
        _ => {}
    }
    let operation = head.join(".");
    match *kind {
        "u16" | "b16" => integer::<u16>(&operation),
        "s16" => integer::<i16>(&operation),
        "u32" | "b32" | "pred" => integer::<u32>(&operation),
        "s32" => integer::<i32>(&operation),
        "u64" | "b64" => integer::<u64>(&operation),
        "s64" => integer::<i64>(&operation),
        "f32" => single(&operation),
        "f64" => double(&operation),
        _ => None,
    }
}
