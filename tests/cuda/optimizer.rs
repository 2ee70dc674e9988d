//! What a step of training launches beside products: updates, the norm of gradients, dropout.

use bitnet_model::cuda::launch::Launch;
use bitnet_train::{
    lora::{Kept, Step},
    optimizer::{AdamW, AdamWConfig, Decay, Rates, Update, global_norm},
};
use candle_core::{Device, Tensor, Var};

use super::{
    assert_same,
    emulator::{Buffer, Run, run},
    values,
};

#[test]
fn updates_are_those_of_the_cpu() {
    let (beta1, beta2, eps, lr, weight_decay, grad_factor) = (0.9, 0.95, 1e-8, 1e-2, 0.1, 0.3);
    for count in [1, 1024, 2500] {
        let start = values(count, 51);
        let var = Var::from_slice(&start, count, &Device::Cpu).unwrap();
        let config = AdamWConfig { beta1, beta2, eps, decay: Decay::All };
        let mut adamw = AdamW::new(&[("w".into(), var.clone())], config).unwrap();
        let parameter = Buffer::new(&start);
        let moments = [(); 2].map(|()| Buffer::new(&vec![0f32; count]));
        for update in 1..=3 {
            let mut gradient = values(count, 51 + update);
            gradient[0] = [0., f32::NAN, 1.][update as usize - 1];
            let tensor = Tensor::from_slice(&gradient, count, &Device::Cpu).unwrap();
            let rates = Rates { lr, weight_decay };
            adamw.step(&[tensor], Update { rates, grad_factor }).unwrap();
            let bias = |beta: f64| 1. - beta.powf(f64::from(update));
            let coefficients = [
                grad_factor,
                1. - lr * weight_decay,
                1. - beta1,
                beta2,
                1. - beta2,
                bias(beta2).sqrt(),
                eps,
                lr / bias(beta1),
            ];
            let gradient = Buffer::new(&gradient);
            let (parameter, gradient) = (parameter.address(), gradient.address());
            let moments = [0, 1].map(|i| moments[i].address());
            let coefficients = coefficients.map(|x| x as f32);
            run(&Launch::adamw(parameter, gradient, moments, count, coefficients), Run::ONE[0]);
        }
        let expected = var.to_vec1::<f32>().unwrap();
        assert!(count == 1 || expected[1] != start[1]);
        assert_same(&parameter.read(), &expected, &format!("{count}"));
    }
}

#[test]
fn norms_of_gradients_are_those_of_the_cpu() {
    for count in [1, 7, 8, 65535, 65537, 33 * 65536 + 9] {
        let x = values(count, 55);
        let tensor = Tensor::from_slice(&x, count, &Device::Cpu).unwrap();
        let expected = global_norm([&tensor]).unwrap();
        let x = Buffer::new(&x);
        for how in [Run::ALL[1], Run::ALL[3]] {
            let sums = Buffer::new(&vec![f64::NAN; Launch::square_sums(count)]);
            run(&Launch::squares(x.address(), count, sums.address()), how);
            assert_eq!(sums.read().iter().sum::<f64>().sqrt(), expected, "{count} {how:?}");
        }
    }
}

#[test]
fn what_is_dropped_is_what_the_cpu_drops() {
    let step = Step::new(3, Kept::new(0));
    step.begin(5, 1, 7);
    let stream = step.stream("here").unwrap();
    for (rows, width) in [(3, 1), (2, 300), (1, 1500)] {
        let x = values(rows * width, 56);
        let mut expected = x.clone();
        stream.drop(0.3, width, &mut expected);
        assert!(width == 1 || expected.contains(&0.));
        let dropout = stream.dropout(0.3, rows);
        let (x, keys) = (Buffer::new(&x), Buffer::new(&dropout.keys));
        let y = Buffer::new(&vec![f32::NAN; rows * width]);
        let how = (&dropout, keys.address());
        run(&Launch::dropout(x.address(), width, how, y.address()), Run::ONE[0]);
        assert_same(&y.read(), &expected, &format!("{rows} × {width}"));
    }
}
