//! Runs ONNX graphs: one loop an operator, as the specification of ONNX and of `MatMulNBits` defines it, in f64.

use std::collections::HashMap;

use super::onnx_file::{Array, File, Node};

/// The outputs of `file`, by name.
pub fn run(file: &File, inputs: HashMap<String, Array>) -> HashMap<String, Array> {
    let mut values = inputs;
    values.extend(file.constants.iter().map(|(name, constant)| (name.clone(), constant.array())));
    for node in &file.nodes {
        let inputs: Vec<&Array> = node.inputs.iter().map(|name| &values[name]).collect();
        let outputs = outputs(node, &inputs);
        assert_eq!(outputs.len(), node.outputs.len());
        for (name, output) in node.outputs.iter().zip(outputs) {
            assert!(values.insert(name.clone(), output).is_none(), "{name} is there");
        }
    }
    file.outputs.iter().map(|(name, ..)| (name.clone(), values[name].clone())).collect()
}

fn outputs(node: &Node, x: &[&Array]) -> Vec<Array> {
    let int = |name: &str| node.ints[name][0];
    let axis = |rank: usize| int("axis").rem_euclid(rank as i64) as usize;
    let truth = |yes: bool| f64::from(u8::from(yes));
    let one = match &node.operator[..] {
        "Identity" => x[0].clone(),
        "Cast" if int("to") == 9 => map(x[0], |x| truth(x != 0.)),
        "Cast" => x[0].clone(), // every value has a place in the other type: that is asserted where it is used
        "Abs" => map(x[0], f64::abs),
        "Cos" => map(x[0], f64::cos),
        "Sin" => map(x[0], f64::sin),
        "Sqrt" => map(x[0], f64::sqrt),
        "Round" => map(x[0], f64::round_ties_even),
        "Floor" => map(x[0], f64::floor),
        "Relu" => map(x[0], |x| x.max(0.)),
        "Sigmoid" => map(x[0], |x| 1. / (1. + (-x).exp())),
        "Add" => broadcast(x[0], x[1], |a, b| a + b),
        "Sub" => broadcast(x[0], x[1], |a, b| a - b),
        "Mul" => broadcast(x[0], x[1], |a, b| a * b),
        "Div" => broadcast(x[0], x[1], |a, b| a / b),
        "Pow" => broadcast(x[0], x[1], f64::powf),
        "Max" => broadcast(x[0], x[1], f64::max),
        "And" => broadcast(x[0], x[1], |a, b| a * b),
        "LessOrEqual" => broadcast(x[0], x[1], |a, b| truth(a <= b)),
        "Where" => map(x[0], |seen| if seen != 0. { x[1].data[0] } else { x[2].data[0] }),
        "ReduceMean" => rows(x, |row| row.iter().sum::<f64>() / row.len() as f64),
        "ReduceMax" => rows(x, |row| row.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
        "Softmax" => softmax(x[0]),
        "Shape" => {
            Array::new(&[x[0].dims.len()], x[0].dims.iter().map(|&dim| dim as f64).collect())
        }
        "Range" => {
            let [start, end] = [x[0], x[1]].map(|x| x.data[0] as i64);
            assert_eq!(x[2].data, [1.]);
            Array::new(&[(end - start) as usize], (start..end).map(|x| x as f64).collect())
        }
        "Gather" => {
            let width: usize = x[0].dims[1..].iter().product();
            let ids = x[1].data.iter().map(|&id| id as usize);
            let data = ids.flat_map(|id| x[0].data[id * width..][..width].to_vec()).collect();
            Array::new(&[&x[1].dims, &x[0].dims[1..]].concat(), data)
        }
        "Unsqueeze" => {
            let rank = x[0].dims.len() + x[1].data.len();
            let mut dims = x[0].dims.clone();
            for axis in &x[1].data {
                dims.insert((*axis as i64).rem_euclid(rank as i64) as usize, 1);
            }
            Array::new(&dims, x[0].data.clone())
        }
        "Reshape" => reshape(x[0], &x[1].data),
        "Transpose" => transpose(x[0], &node.ints["perm"]),
        "Concat" => concat(x, axis(x[0].dims.len())),
        "Tile" => {
            let repeats = x[1].data.iter().map(|&n| n as usize);
            let mut tiled = x[0].clone();
            for (axis, n) in repeats.enumerate() {
                tiled = concat(&vec![&tiled; n], axis);
            }
            tiled
        }
        "Pad" => pad(x[0], &x[1].data, x[2].data[0]),
        "Split" => {
            assert_eq!((axis(x[0].dims.len()), int("num_outputs")), (x[0].dims.len() - 1, 2));
            let width = x[0].dims[x[0].dims.len() - 1];
            let dims = [&x[0].dims[..x[0].dims.len() - 1], &[width / 2]].concat();
            let rows = || x[0].data.chunks(width);
            let half = |from: usize| {
                Array::new(&dims, rows().flat_map(|r| r[from..][..width / 2].to_vec()).collect())
            };
            return vec![half(0), half(width / 2)];
        }
        "MatMul" => matmul(x[0], x[1]),
        "MatMulInteger" => {
            assert!(x[0].data.iter().all(|q| q.fract() == 0. && q.abs() <= 127.));
            matmul(x[0], x[1])
        }
        "Gemm" => {
            assert_eq!(int("transB"), 1);
            matmul(x[0], &transpose(x[1], &[1, 0]))
        }
        "MatMulNBits" => {
            assert_eq!(
                (&node.domain[..], int("bits"), int("accuracy_level")),
                ("com.microsoft", 2, 4)
            );
            matmul_2_bits(x, int("N") as usize, int("K") as usize, int("block_size") as usize)
        }
        operator => panic!("{operator}"),
    };
    vec![one]
}

fn map(x: &Array, f: impl Fn(f64) -> f64) -> Array {
    Array::new(&x.dims, x.data.iter().map(|&x| f(x)).collect())
}

/// The index of each element of a shape.
fn indices(dims: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    (0..dims.iter().product()).map(move |mut at: usize| {
        let mut index = vec![0; dims.len()];
        for (place, dim) in index.iter_mut().zip(dims).rev() {
            (*place, at) = (at % dim, at / dim);
        }
        index
    })
}

/// Where `index`, which may have more dimensions, lies in `dims`, of which those of 1 are repeated.
fn at(dims: &[usize], index: &[usize]) -> usize {
    let index = &index[index.len() - dims.len()..];
    index.iter().zip(dims).fold(0, |at, (&i, &dim)| at * dim + if dim == 1 { 0 } else { i })
}

fn broadcast(a: &Array, b: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
    let rank = a.dims.len().max(b.dims.len());
    let dim = |x: &Array, i: usize| (i + x.dims.len()).checked_sub(rank).map_or(1, |i| x.dims[i]);
    let dims: Vec<usize> = (0..rank)
        .map(|i| match (dim(a, i), dim(b, i)) {
            (1, dim) | (dim, 1) => dim,
            (one, other) => {
                assert_eq!(one, other, "{:?} {:?}", a.dims, b.dims);
                one
            }
        })
        .collect();
    let data = indices(&dims).map(|i| f(a.data[at(&a.dims, &i)], b.data[at(&b.dims, &i)]));
    let data = data.collect();
    Array::new(&dims, data)
}

/// A number for each row of the last dimension, which stays as 1.
fn rows(x: &[&Array], f: impl Fn(&[f64]) -> f64) -> Array {
    assert_eq!(x[1].data, [-1.]);
    let (width, outer) = x[0].dims.split_last().unwrap();
    Array::new(&[outer, &[1]].concat(), x[0].data.chunks(*width).map(f).collect())
}

fn softmax(x: &Array) -> Array {
    let width = *x.dims.last().unwrap();
    let row = |row: &[f64]| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shares: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
        let sum: f64 = shares.iter().sum();
        shares.into_iter().map(move |share| share / sum).collect::<Vec<_>>()
    };
    Array::new(&x.dims, x.data.chunks(width).flat_map(row).collect())
}

fn reshape(x: &Array, shape: &[f64]) -> Array {
    let mut dims: Vec<usize> = shape
        .iter()
        .enumerate()
        .map(|(i, &dim)| if dim == 0. { x.dims[i] } else { dim.max(1.) as usize })
        .collect();
    if let Some(rest) = shape.iter().position(|&dim| dim == -1.) {
        dims[rest] = x.data.len() / dims.iter().product::<usize>();
    }
    Array::new(&dims, x.data.clone())
}

fn transpose(x: &Array, order: &[i64]) -> Array {
    let dims: Vec<usize> = order.iter().map(|&i| x.dims[i as usize]).collect();
    let element = |index: Vec<usize>| {
        let mut from = vec![0; index.len()];
        order.iter().zip(index).for_each(|(&axis, i)| from[axis as usize] = i);
        x.data[at(&x.dims, &from)]
    };
    let data = indices(&dims).map(element).collect();
    Array::new(&dims, data)
}

fn concat(x: &[&Array], axis: usize) -> Array {
    let outer: usize = x[0].dims[..axis].iter().product();
    let mut dims = x[0].dims.clone();
    dims[axis] = x.iter().map(|x| x.dims[axis]).sum();
    let part = |row: usize, x: &Array| {
        let width: usize = x.dims[axis..].iter().product();
        x.data[row * width..][..width].to_vec()
    };
    Array::new(&dims, (0..outer).flat_map(|row| x.iter().flat_map(move |x| part(row, x))).collect())
}

/// Padding behind the last dimension.
fn pad(x: &Array, pads: &[f64], value: f64) -> Array {
    let (&more, none) = pads.split_last().unwrap();
    assert!(pads.len() == 2 * x.dims.len() && none.iter().all(|&n| n == 0.));
    let (width, outer) = x.dims.split_last().unwrap();
    let row = |row: &[f64]| [row, &vec![value; more as usize]].concat();
    let dims = [outer, &[width + more as usize]].concat();
    Array::new(&dims, x.data.chunks(*width).flat_map(row).collect())
}

/// Products of matrices, of each of the outer dimensions, or of all with one.
fn matmul(a: &Array, b: &Array) -> Array {
    let [.., m, k] = a.dims[..] else { panic!("{:?}", a.dims) };
    let [ref outer @ .., rows, n] = b.dims[..] else { panic!("{:?}", b.dims) };
    assert!(k == rows && (outer.is_empty() || *outer == a.dims[..a.dims.len() - 2]));
    let mut data = Vec::new();
    for i in 0..a.data.len() / k {
        let b = if outer.is_empty() { &b.data[..] } else { &b.data[i / m * k * n..][..k * n] };
        let mut row = vec![0.; n];
        for (j, a) in a.data[i * k..][..k].iter().enumerate() {
            row.iter_mut().zip(&b[j * n..]).for_each(|(y, b)| *y += a * b);
        }
        data.extend(row);
    }
    Array::new(&[&a.dims[..a.dims.len() - 1], &[n]].concat(), data)
}

/// At `accuracy_level` 4 the input is first rounded to 8 bits block by block, and must come through that unchanged.
fn matmul_2_bits(x: &[&Array], n: usize, k: usize, block: usize) -> Array {
    let (blocks, bytes) = (k / block, block / 4);
    assert_eq!(x[1].dims, [n, blocks, bytes]);
    assert_eq!(x[2].dims, [n, blocks]);
    for block in x[0].data.chunks(block) {
        let scale = block.iter().map(|q| q.abs()).fold(0., f64::max) / 127.;
        let rounded = |q: &f64| (q / scale).round_ties_even() * scale;
        assert!(block.iter().all(|q| rounded(q) == *q), "{block:?}");
    }
    let weight = |row: usize, col: usize| {
        let (b, i) = (col / block, col % block);
        let byte = x[1].data[(row * blocks + b) * bytes + i / 4] as u8;
        (f64::from(byte >> (i % 4 * 2) & 3) - 2.) * x[2].data[row * blocks + b]
    };
    let data = (0..k).flat_map(|col| (0..n).map(move |row| weight(row, col))).collect();
    matmul(x[0], &Array::new(&[k, n], data))
}
