//! Python's `random.Random`: the Mersenne Twister MT19937, seeded and drawn from as CPython does it. The harness draws its
//! examples and its bootstrap samples with it, so the same draws give the same prompts and the same standard errors.

use std::collections::HashSet;

const N: usize = 624;
const M: usize = 397;

/// The generator.
#[derive(Clone)]
pub struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        let key = if key[1] == 0 { &key[..1] } else { &key[..] };
        // Knuth's linear congruence, then `init_by_array` of Matsumoto and Nishimura.
        let mut state = [19_650_218u32; N];
        for i in 1..N {
            state[i] = step(state[i - 1]).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..N.max(key.len()) {
            let mixed = state[i] ^ step(state[i - 1]).wrapping_mul(1_664_525);
            state[i] = mixed.wrapping_add(key[j]).wrapping_add(j as u32);
            advance(&mut state, &mut i);
            j = (j + 1) % key.len();
        }
        for _ in 1..N {
            let mixed = state[i] ^ step(state[i - 1]).wrapping_mul(1_566_083_941);
            state[i] = mixed.wrapping_sub(i as u32);
            advance(&mut state, &mut i);
        }
        state[0] = 0x8000_0000;
        Self { state, next: N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == N {
            for i in 0..N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `random()`: 53 random bits, from 0 on and below 1.
    pub fn random(&mut self) -> f64 {
        let (a, b) = (self.next_u32() >> 5, self.next_u32() >> 6);
        (f64::from(a) * 67_108_864. + f64::from(b)) / 9_007_199_254_740_992.
    }

    /// A whole number below `n`, which is at least 1 and fits 32 bits.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.next_u32() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// `sample(range(n), k)`: `k` different numbers below `n`. `k` is at most `n`.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        // Python keeps a list of what is left where that is smaller than a set of what is taken.
        let mut small = 21;
        if k > 5 {
            small += 4usize.pow(((k * 3) as f64).log(4.).ceil() as u32);
        }
        if n <= small {
            let mut pool = Vec::from_iter(0..n);
            return (0..k)
                .map(|i| {
                    let j = self.below(n - i);
                    let taken = pool[j];
                    pool[j] = pool[n - i - 1];
                    taken
                })
                .collect();
        }
        let mut taken = HashSet::new();
        (0..k)
            .map(|_| {
                loop {
                    let j = self.below(n);
                    if taken.insert(j) {
                        break j;
                    }
                }
            })
            .collect()
    }

    /// One draw of `choices(range(n))`.
    pub fn choice(&mut self, n: usize) -> usize {
        (self.random() * n as f64) as usize
    }
}

fn step(x: u32) -> u32 {
    x ^ (x >> 30)
}

/// Goes to the next word; the first one takes the value of the last when the end is reached.
fn advance(state: &mut [u32; N], i: &mut usize) {
    *i += 1;
    if *i >= N {
        state[0] = state[N - 1];
        *i = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r = random.Random(1234); r.random(), r.sample(range(64), 5), r.sample(range(20), 6), r.sample(range(7473), 5)` and
    /// `random.Random(2**40 + 5).choices(range(1000), k=4)`, by CPython 3.11.
    #[test]
    fn draws_as_python() {
        let mut rng = PythonRandom::new(1234);
        assert_eq!(rng.random(), 0.9664535356921388);
        assert_eq!(rng.sample(64, 5), [56, 14, 0, 11, 4]);
        assert_eq!(rng.sample(20, 6), [2, 3, 11, 7, 0, 15]);
        assert_eq!(rng.sample(7473, 5), [6461, 129, 2835, 5311, 5105]);
        let mut rng = PythonRandom::new((1 << 40) + 5);
        assert_eq!([(); 4].map(|()| rng.choice(1000)), [504, 268, 925, 530]);
    }
}
