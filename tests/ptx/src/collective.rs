//! What the lanes of a warp do together: shuffles and matrix products.

use crate::instruction::Shuffle;

/// Lanes of a warp.
pub const WARP: usize = 32;

/// The lane whose value a lane gets, or `None` where it keeps its own (PTX ISA, `shfl.sync`).
pub fn partner(mode: Shuffle, lane: usize, by: u64, limits: u64) -> Option<usize> {
    let (lane, by) = (lane as u64, by & 31);
    let (limit, segment) = (limits & 31, limits >> 8 & 31);
    let most = lane & segment | limit & !segment & 31;
    let (partner, inside) = match mode {
        Shuffle::Up => (lane.wrapping_sub(by), lane >= by && lane - by >= most),
        Shuffle::Down => (lane + by, lane + by <= most),
        Shuffle::Butterfly => (lane ^ by, lane ^ by <= most),
        Shuffle::Index => {
            let partner = lane & segment | by & !segment & 31;
            (partner, partner <= most)
        }
    };
    inside.then_some(partner as usize)
}

/// Registers of each lane.
pub type Fragments = [Vec<u32>; WARP];

/// d = a·b + c of signed bytes: `wide` is m16n8k32, else m8n8k16. Which element a register's byte is follows from the tables
/// of the PTX ISA: with lane = 4·g + t, byte j of register i of a is row g + 8·(i mod 2), depth 4·t + j + 16·(i div 2); of b,
/// depth 4·t + j + 16·i of column g; and register i of c and d is row g + 8·(i div 2), column 2·t + i mod 2.
pub fn multiply(wide: bool, a: &Fragments, b: &Fragments, c: &Fragments) -> Fragments {
    let (rows, depth) = if wide { (16, 32) } else { (8, 16) };
    let byte = |register: u32, j: usize| i32::from(register.to_le_bytes()[j] as i8);
    let left =
        |row: usize, k: usize| byte(a[4 * (row % 8) + k % 16 / 4][row / 8 + 2 * (k / 16)], k % 4);
    let right = |k: usize, col: usize| byte(b[4 * col + k % 16 / 4][k / 16], k % 4);
    let mut d = c.clone();
    for row in 0..rows {
        for col in 0..8 {
            let to = &mut d[4 * (row % 8) + col / 2][2 * (row / 8) + col % 2];
            let sum: i32 = (0..depth).map(|k| left(row, k) * right(k, col)).sum();
            *to = to.wrapping_add(sum as u32);
        }
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_find_each_other() {
        let all = |mode, by, limits| {
            Vec::from_iter((0..WARP).map(|lane| partner(mode, lane, by, limits).unwrap_or(lane)))
        };
        assert_eq!(all(Shuffle::Butterfly, 3, 31), Vec::from_iter((0..WARP).map(|l| l ^ 3)));
        assert_eq!(all(Shuffle::Index, 5, 31), vec![5; WARP]);
        assert_eq!(all(Shuffle::Down, 2, 31)[28..], [30, 31, 30, 31]);
        assert_eq!(all(Shuffle::Up, 1, 0)[..3], [0, 0, 1]);
        // Segments of sixteen lanes: the mask is 0x1000.
        assert_eq!(all(Shuffle::Index, 1, 0x101f)[15..18], [1, 17, 17]);
    }

    #[test]
    fn products_are_those_of_matrices() {
        // Element (i, k) of a is in the register that the tables name; the product is computed from a and b as matrices.
        for (wide, rows, depth) in [(true, 16usize, 32usize), (false, 8, 16)] {
            let a = |row: usize, k: usize| ((row * 37 + k * 11) % 255) as i32 - 127;
            let b = |k: usize, col: usize| ((k * 53 + col * 29) % 251) as i32 - 125;
            let pack = |value: &dyn Fn(usize) -> i32| {
                u32::from_le_bytes([0, 1, 2, 3].map(|j| value(j) as i8 as u8))
            };
            let lane = |lane: usize| (lane / 4, lane % 4);
            let left = std::array::from_fn(|l| {
                let (g, t) = lane(l);
                let part = |i: usize| pack(&|j| a(g + 8 * (i % 2), 4 * t + j + 16 * (i / 2)));
                (0..rows * depth / 128).map(part).collect::<Vec<_>>()
            });
            let right = std::array::from_fn(|l| {
                let (g, t) = lane(l);
                (0..depth / 16).map(|i| pack(&|j| b(4 * t + j + 16 * i, g))).collect::<Vec<_>>()
            });
            let c = std::array::from_fn(|l| vec![l as u32; rows / 4]);
            let d = multiply(wide, &left, &right, &c);
            for (l, found) in d.iter().enumerate() {
                let (g, t) = lane(l);
                for (i, found) in found.iter().enumerate() {
                    let (row, col) = (g + 8 * (i / 2), 2 * t + i % 2);
                    let sum: i32 = (0..depth).map(|k| a(row, k) * b(k, col)).sum();
                    assert_eq!(*found as i32, sum + l as i32, "{row}, {col}");
                }
            }
        }
    }
}
