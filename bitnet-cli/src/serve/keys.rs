//! API keys: who may ask.

use std::path::Path;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// Where keys are looked for besides a file.
pub const VARIABLE: &str = "BITNET_API_KEYS";
/// Keys whose names begin with this may change what is served.
const ADMIN: &str = "admin";
/// Shorter keys can be guessed.
const SHORT: usize = 16;

/// The keys, of which only hashes are kept.
#[derive(Default)]
pub struct Keys(Vec<Key>);

struct Key {
    name: String,
    hash: [u8; 32],
}

/// Who asks, as a key says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The key's name.
    pub name: String,
    /// Whether it may change what is served.
    pub is_admin: bool,
}

impl Keys {
    /// Reads `name:key` lines of a file and of the environment, there also separated by commas; a key alone is called by its
    /// number. `None` if there are none.
    ///
    /// # Errors
    /// A file that cannot be read or has no key, a name or key that occurs twice. Errors never show a key.
    pub fn read(file: Option<&Path>) -> anyhow::Result<Option<Self>> {
        let mut keys = Self::default();
        if let Some(path) = file {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
            let source = path.display().to_string();
            keys.add(text.lines(), &source)?;
            if keys.0.is_empty() {
                bail!("{source}: has no key: write lines of `name:key`");
            }
        }
        if let Ok(text) = std::env::var(VARIABLE) {
            keys.add(text.split(['\n', ',']), VARIABLE)?;
        }
        Ok((!keys.0.is_empty()).then_some(keys))
    }

    fn add<'a>(
        &mut self,
        lines: impl Iterator<Item = &'a str>,
        source: &str,
    ) -> anyhow::Result<()> {
        for (index, line) in lines.map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, key) = match line.split_once(':') {
                Some((name, key)) => (name.trim().to_owned(), key.trim()),
                None => (format!("key{}", self.0.len() + 1), line),
            };
            let place = format!("{source}: key {}", index + 1);
            if name.is_empty() || key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
                bail!("{place}: must be `name:key`, the key of visible ASCII characters");
            }
            if key.len() < SHORT {
                tracing::warn!(
                    "{place} (`{name}`) is short: {SHORT} random characters resist guessing"
                );
            }
            let hash = Sha256::digest(key).into();
            if self.0.iter().any(|other| other.name == name || other.hash == hash) {
                bail!("{place} (`{name}`): the name or the key is there already");
            }
            self.0.push(Key { name, hash });
        }
        Ok(())
    }

    /// Whose key this is. It takes the same time for every key of a length: hashes are compared, and all of them.
    pub fn holder(&self, key: &str) -> Option<Holder> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let (mut found, mut at) = (Choice::from(0), 0u32);
        for (index, key) in (0u32..).zip(&self.0) {
            let equal = key.hash.ct_eq(&hash);
            at.conditional_assign(&index, equal);
            found |= equal;
        }
        let key = self.0.get(at as usize).filter(|_| found.into())?;
        Some(Holder { name: key.name.clone(), is_admin: key.name.starts_with(ADMIN) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_names() {
        let mut keys = Keys::default();
        keys.add("# whose\nann: 0123456789abcdef\n\nadmin-1:a:b\nalone\n".lines(), "f").unwrap();
        let name = |key: &str| keys.holder(key).map(|holder| (holder.name, holder.is_admin));
        assert_eq!(name("0123456789abcdef"), Some(("ann".into(), false)));
        assert_eq!(name("a:b"), Some(("admin-1".into(), true)));
        assert_eq!(name("alone"), Some(("key3".into(), false)));
        assert_eq!(name(""), None);
        assert_eq!(name("ann"), None);
        let mut error = |line: &str| keys.add([line].into_iter(), "f").unwrap_err().to_string();
        assert_eq!(error("ann:secret"), "f: key 1 (`ann`): the name or the key is there already");
        assert!(error("bob:alone").contains("`bob`") && !error("bob:alone").contains("alone)"));
        assert!(error("bob:se cret").contains("visible") && !error("bob:se cret").contains("cret"));
    }
}
