//! The loop on several ranks, threads of this process.

use std::thread;

use super::*;
use crate::{
    distill::balance::{Balance, Balanced, Balancing},
    distributed::{
        rank_zero_first,
        threads::{Threads, threads},
    },
};

/// Weights, metrics and outcome of every rank of a job of threads, which share the output folder.
pub(super) fn run_ranks(
    recipe: &Recipe,
    size: usize,
    interrupt: Option<usize>,
) -> Vec<(Vec<Vec<f32>>, Outcome)> {
    let interrupted = AtomicBool::new(false);
    let run_rank = |mut communicator: Threads| {
        let model = Bigram::new();
        let dataset = rank_zero_first(&mut communicator, || Dataset::open(recipe)).unwrap();
        let is_last = communicator.rank() + 1 == size;
        let mut trainer =
            Trainer::open(recipe, dataset, model.parameters.clone(), true, Box::new(communicator))
                .unwrap();
        // Only the last rank is told to stop.
        let (deaf, mut observe) = (AtomicBool::new(false), |event: Event| {
            if let (true, Event::Update { record, .. }) = (is_last, event) {
                interrupted.store(Some(record.step) == interrupt, Ordering::Relaxed);
            }
        });
        let flag = if is_last { &interrupted } else { &deaf };
        let outcome = trainer.run(&model, &mut observe, flag).unwrap();
        trainer.leave().unwrap();
        (model.weights(), outcome)
    };
    thread::scope(|scope| {
        let run_rank = &run_rank;
        let ranks: Vec<_> =
            threads(size).into_iter().map(|rank| scope.spawn(move || run_rank(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn two_ranks_equal_one_with_twice_the_batch() {
    let recipe = |batch_size, accumulation| {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = recipe(dir.path());
        recipe.train.batch_size = batch_size;
        recipe.train.gradient_accumulation = accumulation;
        recipe.train.steps = Some(12);
        (dir, recipe)
    };
    for (size, batch_size, accumulation) in [(2, 4, 1), (3, 1, 2)] {
        let (_one_dir, one) = recipe(size * batch_size, accumulation);
        let model = Bigram::new();
        run(&mut start(&one, &model), &model).unwrap();

        let (_dir, many) = recipe(batch_size, accumulation);
        let ranks = run_ranks(&many, size, None);
        for (weights, outcome) in &ranks {
            assert_eq!((weights, *outcome), (&ranks[0].0, Outcome::Finished));
        }
        for (a, b) in model.weights().iter().flatten().zip(ranks[0].0.iter().flatten()) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        let (one, many) = (untimed_metrics(&one), untimed_metrics(&many));
        assert_eq!(one.len(), many.len());
        for (a, b) in one.iter().zip(&many) {
            match (a, b) {
                (Record::Train(a), Record::Train(b)) => {
                    assert!((a.loss - b.loss).abs() < 1e-5, "{a:?} {b:?}");
                    assert!((a.terms["cross_entropy"] - b.terms["cross_entropy"]).abs() < 1e-5);
                    assert!((a.grad_norm - b.grad_norm).abs() < 1e-5, "{a:?} {b:?}");
                    assert_eq!((a.step, a.lr, a.tokens), (b.step, b.lr, b.tokens));
                }
                (Record::Evaluation(a), Record::Evaluation(b)) => {
                    assert!((a.nats_per_token - b.nats_per_token).abs() < 1e-5, "{a:?} {b:?}");
                    assert_eq!((a.step, a.tokens), (b.step, b.tokens));
                }
                (Record::Codes(a), Record::Codes(b)) => {
                    let names = |record: &metrics::CodesRecord| {
                        Vec::from_iter(record.layers.keys().cloned())
                    };
                    assert_eq!((a.step, names(a)), (b.step, names(b)));
                    // A weight at a threshold may round the other way.
                    for (a, b) in a.layers.values().zip(b.layers.values()) {
                        assert!((a.zero - b.zero).abs() < 1e-2, "{a:?} {b:?}");
                    }
                }
                _ => panic!("{a:?} {b:?}"),
            }
        }
    }
}

/// A bigram model with a second term, which weighs in the metrics alone. It differs from rank to rank, and its ratio to
/// the first does.
struct Weighed {
    bigram: Bigram,
    balance: Balance,
}

impl Task for Weighed {
    fn pass(&self, batch: &Batch, items: usize, gradients: &mut Gradients) -> Result<Vec<Part>> {
        let mut parts = self.bigram.pass(batch, items, gradients)?;
        let (value, weight) = (parts[0].value.powi(2), self.balance.weight("square", 3.));
        parts.push(Part { name: "square", value, weight });
        Ok(parts)
    }

    fn evaluate(&self, batch: &Batch) -> Result<Vec<Prediction>> {
        self.bigram.evaluate(batch)
    }
}

#[test]
fn terms_are_balanced_by_what_all_ranks_saw() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = recipe(dir.path());
    recipe.train.steps = Some(3);
    let run_rank = |mut communicator: Threads| {
        let balance = Balance::new(Balancing::Auto);
        let weighed = Weighed { bigram: Bigram::new(), balance: balance.clone() };
        let parameters = weighed.bigram.parameters.clone();
        let task = Balanced::new(weighed, balance.clone());
        let dataset = rank_zero_first(&mut communicator, || Dataset::open(&recipe)).unwrap();
        let mut trainer =
            Trainer::open(&recipe, dataset, parameters, false, Box::new(communicator)).unwrap();
        trainer.run(&task, &mut |_| (), &AtomicBool::new(false)).unwrap();
        trainer.leave().unwrap();
        balance.weight("square", 3.)
    };
    let next: Vec<f64> = thread::scope(|scope| {
        let ranks: Vec<_> =
            threads(3).into_iter().map(|rank| scope.spawn(|| run_rank(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let (follower, mut updates) = (Balance::new(Balancing::Auto), 0);
    for record in untimed_metrics(&recipe) {
        if let Record::Train(train) = &record {
            assert_eq!(train.weights["square"], follower.weight("square", 3.));
            updates += 1;
        }
        follower.replay(&[record]);
    }
    assert_eq!((updates, next), (3, vec![follower.weight("square", 3.); 3]));
}

#[test]
fn a_stop_on_one_rank_stops_all_and_the_job_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let outcomes = |ranks: &[(Vec<Vec<f32>>, Outcome)]| -> Vec<Outcome> {
        ranks.iter().map(|(_, outcome)| *outcome).collect()
    };
    let stopped = run_ranks(&recipe, 2, Some(7));
    assert_eq!(outcomes(&stopped), [Outcome::Interrupted; 2]);
    assert!(recipe.output.dir.join("step-7").is_dir());
    let resumed = run_ranks(&recipe, 2, None);
    assert_eq!(outcomes(&resumed), [Outcome::Finished; 2]);

    let whole_dir = tempfile::tempdir().unwrap();
    let whole_recipe = self::recipe(whole_dir.path());
    let whole = run_ranks(&whole_recipe, 2, None);
    assert_eq!(resumed[0].0, whole[1].0);
    assert_eq!(untimed_metrics(&recipe), untimed_metrics(&whole_recipe));

    // The windows of an update are part of what a run is.
    let mut other = recipe.clone();
    let message = resume(&other, &Bigram::new()).unwrap_err().to_string();
    assert!(message.contains("`train.batch_size` was 8 and is 4"), "{message}");
    other.train.batch_size = 8;
    assert_eq!(resume(&other, &Bigram::new()).unwrap().state().step, 23);
}

#[test]
fn ranks_with_other_weights_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let messages = thread::scope(|scope| {
        let recipe = &recipe;
        let ranks: Vec<_> = threads(2)
            .into_iter()
            .map(|mut communicator| {
                scope.spawn(move || {
                    let parameters = Bigram::new().parameters;
                    if communicator.rank() == 1 {
                        parameters[2].1.set(&parameters[2].1.affine(1., 1e-6).unwrap()).unwrap();
                    }
                    let dataset =
                        rank_zero_first(&mut communicator, || Dataset::open(recipe)).unwrap();
                    let opened =
                        Trainer::open(recipe, dataset, parameters, false, Box::new(communicator));
                    opened.unwrap_err().to_string()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<String>>()
    });
    for message in messages {
        assert!(message.starts_with("rank 1 and rank 0 have different weights"), "{message}");
    }
}
