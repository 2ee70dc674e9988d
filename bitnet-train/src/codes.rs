//! A census of the ternary codes: how many are −1, 0 and +1, and how many have changed since the census before.
//!
//! The codes of the census before are kept packed, four in a byte, and go into every checkpoint: a resumed run counts
//! the same flips as an uninterrupted one.

use std::{collections::BTreeMap, fs, path::Path};

use bitnet_model::{quant::WeightQuantizer, storage::with_slice};
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::{
    Error, Result,
    checkpoint::tensors::{TensorFile, read, write_tensors},
    metrics::{CodesRecord, LayerCodes},
};

/// The file of a checkpoint that holds the codes of the last census.
pub const FILE: &str = "codes.safetensors";

/// The codes of a matrix at the last census: `code + 1` in two bits, four in a byte, the first in the lowest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packed(Vec<u8>);

/// What the next census compares with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    last: BTreeMap<String, Packed>,
}

impl Census {
    /// Counts the codes of every parameter that `codes` gives codes −1, 0 and 1 for; it is called with the name and
    /// the values of each.
    ///
    /// # Errors
    /// A parameter whose values are not f32 on the CPU.
    pub fn take(
        &mut self,
        step: usize,
        parameters: &[(String, Var)],
        codes: impl Fn(&str, &[f32]) -> Option<Vec<i8>>,
    ) -> Result<CodesRecord> {
        let mut record = CodesRecord { step, layers: BTreeMap::new() };
        for (name, var) in parameters {
            let Some(codes) = with_slice::<f32, _>(var, |latent| Ok(codes(name, latent)))? else {
                continue;
            };
            let packed = pack(&codes);
            let flipped = self.last.get(name).and_then(|last| flips(last, &packed));
            let fraction = |count: usize| count as f64 / codes.len().max(1) as f64;
            let count_of = |code: i8| fraction(codes.iter().filter(|&&c| c == code).count());
            let layer = LayerCodes {
                count: codes.len(),
                minus: count_of(-1),
                zero: count_of(0),
                plus: count_of(1),
                flipped: flipped.map(fraction),
            };
            record.layers.insert(name.trim_end_matches(".weight").to_owned(), layer);
            self.last.insert(name.clone(), packed);
        }
        Ok(record)
    }

    /// Writes the codes into a checkpoint's folder; nothing before the first census.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, checkpoint: &Path) -> Result<()> {
        if self.last.is_empty() {
            return Ok(());
        }
        let tensor = |(name, Packed(bytes)): (&String, &Packed)| -> Result<(String, Tensor)> {
            Ok((name.clone(), Tensor::from_slice(bytes, bytes.len(), &Device::Cpu)?))
        };
        let tensors = self.last.iter().map(tensor).collect::<Result<Vec<_>>>()?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
        write_tensors(&checkpoint.join(FILE), tensors, ("codes", "2 bits".into()))
    }

    /// The codes in a checkpoint's folder; none if it has no such file, as those of older runs.
    ///
    /// # Errors
    /// A file that cannot be read, or is none of [`Census::save`].
    pub fn load(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(FILE);
        if !fs::exists(&path).map_err(Error::io(&path))? {
            return Ok(Self::default());
        }
        let bytes = read(&path)?;
        let last = TensorFile::parse(&path, &bytes)?.bytes()?;
        Ok(Self { last: last.into_iter().map(|(name, bytes)| (name, Packed(bytes))).collect() })
    }
}

/// The codes of a whole matrix.
pub fn codes(latent: &[f32], quantizer: WeightQuantizer) -> Vec<i8> {
    let codes = quantizer.codes(latent);
    latent.par_iter().map(|&weight| codes.code(weight)).collect()
}

fn pack(codes: &[i8]) -> Packed {
    let byte = |codes: &[i8]| {
        codes.iter().enumerate().fold(0, |byte, (i, code)| byte | ((code + 1) as u8) << (2 * i))
    };
    Packed(codes.chunks(4).map(byte).collect())
}

/// How many codes differ; `None` if their number does.
fn flips(Packed(old): &Packed, Packed(new): &Packed) -> Option<usize> {
    // A code differs if either of its bits does.
    let differ = |(old, new): (&u8, &u8)| {
        let bits = old ^ new;
        ((bits | bits >> 1) & 0b0101_0101).count_ones() as usize
    };
    (old.len() == new.len()).then(|| old.iter().zip(new).map(differ).sum())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A parameter whose values are its codes.
    fn parameters(layers: &[(&str, &[i8])]) -> Vec<(String, Var)> {
        let var = |codes: &[i8]| {
            let values: Vec<f32> = codes.iter().map(|&code| code.into()).collect();
            Var::from_vec(values, codes.len(), &Device::Cpu).unwrap()
        };
        layers.iter().map(|(name, codes)| (format!("{name}.weight"), var(codes))).collect()
    }

    fn as_they_are(name: &str, latent: &[f32]) -> Option<Vec<i8>> {
        (!name.contains("norm")).then(|| latent.iter().map(|&x| x as i8).collect())
    }

    fn two_of_a_length() -> impl Strategy<Value = (Vec<i8>, Vec<i8>)> {
        (1..70usize).prop_flat_map(|n| {
            let codes = || prop::collection::vec(-1..=1i8, n);
            (codes(), codes())
        })
    }

    proptest! {
        #[test]
        fn counts_equal_naive_ones((old, new) in two_of_a_length()) {
            let mut census = Census::default();
            let first = census.take(1, &parameters(&[("layer", &old), ("norm", &[0])]), as_they_are).unwrap();
            prop_assert_eq!(first.layers.len(), 1);
            prop_assert_eq!(first.layers["layer"].flipped, None);
            let second = census.take(2, &parameters(&[("layer", &new)]), as_they_are).unwrap();
            let layer = second.layers["layer"];
            let part = |count: usize| count as f64 / new.len() as f64;
            let of = |code: i8| part(new.iter().filter(|&&c| c == code).count());
            let flipped = old.iter().zip(&new).filter(|(a, b)| a != b).count();
            prop_assert_eq!(layer.flipped, Some(part(flipped)));
            prop_assert_eq!((layer.minus, layer.zero, layer.plus), (of(-1), of(0), of(1)));
        }
    }

    #[test]
    fn codes_come_back_from_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Census::load(dir.path()).unwrap(), Census::default());
        Census::default().save(dir.path()).unwrap();
        assert!(!dir.path().join(FILE).exists());
        let mut census = Census::default();
        let parameters = parameters(&[("a", &[1, 0, -1, 1, 1]), ("b", &[0; 8])]);
        census.take(1, &parameters, as_they_are).unwrap();
        census.save(dir.path()).unwrap();
        assert_eq!(Census::load(dir.path()).unwrap(), census);
        fs::write(dir.path().join(FILE), "short").unwrap();
        let message = Census::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains(FILE), "{message}");
    }
}
