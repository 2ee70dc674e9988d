//! scratch
use std::sync::atomic::AtomicBool;
use bitnet_train::{experiment, recipe::Recipe, trainer::Event};
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let recipe = Recipe::from_file(path.as_ref()).unwrap();
    let s = experiment::run(&recipe, std::env::args().nth(2).is_some(), &mut |e| match e {
        Event::Update{record, steps, eta} => if record.step % 10 == 0 { eprintln!("{}/{} loss {:.4} lr {:.2e} gn {:.3} tok/s {:.0} eta {:?}", record.step, steps, record.loss, record.lr, record.grad_norm, record.tokens_per_second, eta) },
        Event::Evaluation{record, is_best} => eprintln!("{record:?} best {is_best}"),
        Event::Saved(p) => eprintln!("saved {p:?}"),
    }, &AtomicBool::new(false));
    eprintln!("{s:?}");
}
