//! A recipe as the text of a recipe, complete: with every default and with absolute paths.

use std::path::{self, Path, PathBuf};

use super::Recipe;
use crate::{Error, Result};

impl Recipe {
    /// TOML that reads back to the same recipe, wherever it lies.
    ///
    /// # Errors
    /// A path that cannot be made absolute, or a value that TOML cannot express.
    pub fn to_toml(&self) -> Result<String> {
        let recipe = self.absolute()?;
        toml::to_string_pretty(&recipe)
            .map_err(|error| Error::Input(format!("the recipe cannot be written as TOML: {error}")))
    }

    /// The same recipe with absolute paths.
    fn absolute(&self) -> Result<Self> {
        let mut recipe = self.clone();
        for path in recipe.paths_mut() {
            *path = path::absolute(&*path).map_err(Error::io(path.clone()))?;
        }
        Ok(recipe)
    }

    /// Makes relative paths start at `dir`.
    pub(super) fn start_at(&mut self, dir: &Path) {
        for path in self.paths_mut() {
            *path = dir.join(&*path);
        }
    }

    /// Every path of the recipe.
    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let sources = self.data.train.iter_mut().chain(&mut self.data.validation);
        let paths = sources.map(|source| &mut source.path).chain(&mut self.data.tokenizer);
        paths.chain([&mut self.output.dir])
    }
}
