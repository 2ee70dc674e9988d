//! Exact values: quotients of polynomials with rational coefficients. Their symbols are variables, constants such as π, roots of
//! primes, and what nothing is known of, such as `\sin x`.

use std::{collections::BTreeMap, ops::Neg};

/// A fraction in lowest terms with a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rational {
    numerator: i128,
    denominator: i128,
}

/// A product of powers of symbols; 1 if it is empty.
type Monomial = BTreeMap<Symbol, u32>;

/// Something that cannot be computed further.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Symbol {
    /// A variable, a constant, or a function of what its name says.
    Name(String),
    /// The positive root of this degree of a prime.
    Root { prime: i128, degree: u32 },
}

/// A sum of monomials with factors that are not 0.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
struct Polynomial(BTreeMap<Monomial, Rational>);

/// A value. Every operation is `None` where it is not defined, or where it would go beyond the limits below: then nothing is
/// known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    numerator: Polynomial,
    /// Not 0.
    denominator: Polynomial,
}

/// Terms of a polynomial.
const TERMS: usize = 128;
/// The largest exponent.
const POWER: i128 = 64;
/// Roots are taken of numbers whose prime factors but one are below this.
const LARGEST_FACTOR: i128 = 100_000;

fn gcd(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Rational {
    const ONE: Self = Self { numerator: 1, denominator: 1 };

    fn new(numerator: i128, denominator: i128) -> Option<Self> {
        if denominator == 0 || numerator == i128::MIN || denominator == i128::MIN {
            return None;
        }
        let common = gcd(numerator.abs(), denominator.abs()) * denominator.signum();
        Some(Self { numerator: numerator / common, denominator: denominator / common })
    }

    fn plus(self, other: Self) -> Option<Self> {
        let left = self.numerator.checked_mul(other.denominator)?;
        let right = other.numerator.checked_mul(self.denominator)?;
        Self::new(left.checked_add(right)?, self.denominator.checked_mul(other.denominator)?)
    }

    fn times(self, other: Self) -> Option<Self> {
        Self::new(
            self.numerator.checked_mul(other.numerator)?,
            self.denominator.checked_mul(other.denominator)?,
        )
    }
}

impl Polynomial {
    fn constant(value: Rational) -> Self {
        let mut terms = BTreeMap::new();
        if value.numerator != 0 {
            terms.insert(Monomial::new(), value);
        }
        Self(terms)
    }

    fn symbol(symbol: Symbol) -> Self {
        Self(BTreeMap::from([(Monomial::from([(symbol, 1)]), Rational::ONE)]))
    }

    fn as_constant(&self) -> Option<Rational> {
        match self.0.len() {
            0 => Rational::new(0, 1),
            1 => self.0.get(&Monomial::new()).copied(),
            _ => None,
        }
    }

    fn add(&mut self, monomial: Monomial, factor: Rational) -> Option<()> {
        let sum = match self.0.remove(&monomial) {
            Some(there) => there.plus(factor)?,
            None => factor,
        };
        if sum.numerator != 0 {
            self.0.insert(monomial, sum);
        }
        (self.0.len() <= TERMS).then_some(())
    }

    fn plus(&self, other: &Self) -> Option<Self> {
        let mut sum = self.clone();
        for (monomial, &factor) in &other.0 {
            sum.add(monomial.clone(), factor)?;
        }
        Some(sum)
    }

    fn times(&self, other: &Self) -> Option<Self> {
        let mut product = Self::default();
        for (a, &factor) in &self.0 {
            for (b, &other) in &other.0 {
                let mut monomial = a.clone();
                for (symbol, power) in b {
                    let sum = monomial.get(symbol).copied().unwrap_or(0) + power;
                    if i128::from(sum) > POWER {
                        return None;
                    }
                    monomial.insert(symbol.clone(), sum);
                }
                let factor = whole_roots(&mut monomial, factor.times(other)?)?;
                product.add(monomial, factor)?;
            }
        }
        Some(product)
    }
}

/// Takes the `degree`-th power of a root, which is a prime, out of a monomial.
fn whole_roots(monomial: &mut Monomial, mut factor: Rational) -> Option<Rational> {
    for (symbol, power) in monomial.iter_mut() {
        if let Symbol::Root { prime, degree } = symbol {
            while *power >= *degree {
                *power -= *degree;
                factor = factor.times(Rational::new(*prime, 1)?)?;
            }
        }
    }
    monomial.retain(|_, power| *power > 0);
    Some(factor)
}

impl Neg for &Value {
    type Output = Option<Value>;

    fn neg(self) -> Option<Value> {
        Value::fraction(-1, 1)?.times(self)
    }
}

impl Value {
    /// `numerator / denominator`.
    pub fn fraction(numerator: i128, denominator: i128) -> Option<Self> {
        Some(Self::of(Polynomial::constant(Rational::new(numerator, denominator)?)))
    }

    fn of(numerator: Polynomial) -> Self {
        Self { numerator, denominator: Polynomial::constant(Rational::ONE) }
    }

    /// A variable or constant of which nothing but its name is known.
    pub fn symbol(name: &str) -> Self {
        Self::of(Polynomial::symbol(Symbol::Name(name.into())))
    }

    /// A function of which nothing is known but that equal arguments have equal values.
    pub fn unknown(function: &str, arguments: &[&Self]) -> Option<Self> {
        let mut name = function.to_owned();
        for argument in arguments {
            // Only a polynomial has one form alone.
            let divisor = argument.denominator.as_constant()?;
            let inverse = Rational::new(divisor.denominator, divisor.numerator)?;
            let form = argument.numerator.times(&Polynomial::constant(inverse))?;
            name += &format!("({:?})", form.0);
        }
        (name.len() < 4096).then(|| Self::symbol(&name))
    }

    /// The number, if it is one.
    fn as_constant(&self) -> Option<Rational> {
        let (a, b) = (self.numerator.as_constant()?, self.denominator.as_constant()?);
        a.times(Rational::new(b.denominator, b.numerator)?)
    }

    /// The whole number, if it is one.
    pub fn as_integer(&self) -> Option<i128> {
        self.as_constant().filter(|value| value.denominator == 1).map(|value| value.numerator)
    }

    /// The sum.
    pub fn plus(&self, other: &Self) -> Option<Self> {
        let left = self.numerator.times(&other.denominator)?;
        let right = other.numerator.times(&self.denominator)?;
        let denominator = self.denominator.times(&other.denominator)?;
        Some(Self { numerator: left.plus(&right)?, denominator })
    }

    /// The product.
    pub fn times(&self, other: &Self) -> Option<Self> {
        Some(Self {
            numerator: self.numerator.times(&other.numerator)?,
            denominator: self.denominator.times(&other.denominator)?,
        })
    }

    /// The quotient; `None` by 0.
    pub fn over(&self, other: &Self) -> Option<Self> {
        if other.numerator.0.is_empty() {
            return None;
        }
        let inverse =
            Self { numerator: other.denominator.clone(), denominator: other.numerator.clone() };
        self.times(&inverse)
    }

    /// The power; what is no whole power of a value, and no root of a number, is unknown. `None` for 0 to the 0 and less.
    pub fn to_power(&self, exponent: &Self) -> Option<Self> {
        let is_zero = self.numerator.0.is_empty();
        let Some(Rational { numerator, denominator }) = exponent.as_constant() else {
            return Self::unknown("power", &[self, exponent]);
        };
        if numerator.abs() > POWER || denominator > POWER || (is_zero && numerator <= 0) {
            return None;
        }
        let base = match denominator {
            1 => self.clone(),
            degree => self.root(degree as u32)?,
        };
        let mut power = Self::fraction(1, 1)?;
        for _ in 0..numerator.unsigned_abs() {
            power = power.times(&base)?;
        }
        if numerator < 0 { Self::fraction(1, 1)?.over(&power) } else { Some(power) }
    }

    /// The real root of this degree, from 2 on: of numbers that have one by their prime factors, of all else unknown.
    pub fn root(&self, degree: u32) -> Option<Self> {
        let Some(Rational { numerator, denominator }) = self.as_constant() else {
            return Self::unknown(&format!("root{degree}"), &[self]);
        };
        if degree < 2 || i128::from(degree) > POWER || (numerator < 0 && degree.is_multiple_of(2)) {
            return None;
        }
        let root = roots_of_factors(numerator.checked_abs()?, degree)?;
        let root = root.over(&roots_of_factors(denominator, degree)?)?;
        if numerator < 0 { -&root } else { Some(root) }
    }

    /// Whether two values are the same; also where both are defined as functions. `None` if that would take too long.
    pub fn equals(&self, other: &Self) -> Option<bool> {
        let left = self.numerator.times(&other.denominator)?;
        Some(left == other.numerator.times(&self.denominator)?)
    }
}

/// The root of a whole number from 0 on.
fn roots_of_factors(mut number: i128, degree: u32) -> Option<Value> {
    if number == 0 {
        return Value::fraction(0, 1);
    }
    let mut root = Value::fraction(1, 1)?;
    let mut prime = 2;
    while number > 1 {
        if prime * prime > number {
            prime = number; // what is left has no smaller factor
        }
        let mut power = 0;
        while number % prime == 0 {
            number /= prime;
            power += 1;
        }
        for _ in 0..power / degree {
            root = root.times(&Value::fraction(prime, 1)?)?;
        }
        // The sixth root of 8 is the square root of 2.
        let rest = power % degree;
        let common = gcd(i128::from(rest), i128::from(degree)) as u32;
        let symbol = Value::of(Polynomial::symbol(Symbol::Root { prime, degree: degree / common }));
        for _ in 0..rest / common {
            root = root.times(&symbol)?;
        }
        prime += 1;
        if prime > LARGEST_FACTOR && number > 1 && prime * prime <= number {
            return None;
        }
    }
    Some(root)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(value: i128) -> Value {
        Value::fraction(value, 1).unwrap()
    }

    #[test]
    fn roots_are_reduced() {
        let same = |a: Value, b: Value| a.equals(&b).unwrap();
        let root = |value: i128, degree| n(value).root(degree).unwrap();
        assert!(same(root(8, 2), n(2).times(&root(2, 2)).unwrap()));
        assert!(same(root(6, 2), root(2, 2).times(&root(3, 2)).unwrap()));
        assert!(same(root(8, 6), root(2, 2)) && same(root(-8, 3), n(-2)));
        assert!(!same(root(2, 2), root(3, 2)) && !same(root(2, 2), n(1)));
        // 1 / (1 + √2) = √2 − 1
        let sum = n(1).plus(&root(2, 2)).unwrap();
        assert!(same(n(1).over(&sum).unwrap(), root(2, 2).plus(&n(-1)).unwrap()));
        assert_eq!(n(-4).root(2), None);
        assert_eq!(n(1).over(&n(0)), None);
        assert!(same(root(1_000_003, 2).times(&root(1_000_003, 2)).unwrap(), n(1_000_003)));
    }

    #[test]
    fn too_much_is_unknown() {
        assert_eq!(n(i128::MAX).times(&n(2)), None);
        assert_eq!(n(2).to_power(&n(1000)), None);
        assert_eq!(n(0).to_power(&n(0)), None);
        let sum = Value::symbol("x").plus(&Value::symbol("y")).unwrap();
        assert!(sum.to_power(&n(20)).is_some());
        let sum = sum.plus(&Value::symbol("z")).unwrap().plus(&n(1)).unwrap();
        assert_eq!(sum.to_power(&n(60)), None);
        // Two primes of 2⁶¹ − 1 and more are not told apart.
        assert_eq!(n((1 << 61) - 1).times(&n((1 << 61) - 1)).unwrap().root(2), None);
    }
}
