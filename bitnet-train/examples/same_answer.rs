//! Compares answers in LaTeX: a line `["one", "other"]` of stdin becomes `[same value, same answer]`. `scripts/peers_math.py` runs
//! it.

use std::{error::Error, io};

use bitnet_train::eval::formula::{same_answer, same_value};

fn main() -> Result<(), Box<dyn Error>> {
    for line in io::stdin().lines() {
        let (a, b): (String, String) = serde_json::from_str(&line?)?;
        println!("{}", serde_json::json!([same_value(&a, &b), same_answer(&a, &b)]));
    }
    Ok(())
}
