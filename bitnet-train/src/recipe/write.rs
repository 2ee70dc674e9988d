//! A recipe as the text of a recipe, complete: with every default and with absolute paths.

use std::path::{self, Path};

use super::{Recipe, init};
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
        let here = path::absolute(".").map_err(Error::io("."))?;
        let mut recipe = self.clone();
        recipe.start_at(&here);
        Ok(recipe)
    }

    /// Makes relative paths start at `dir`.
    pub(super) fn start_at(&mut self, dir: &Path) {
        self.data.start_at(dir);
        self.output.dir = dir.join(&self.output.dir);
        if let Some(distillation) = &mut self.distillation {
            distillation.teacher = init::locate(dir, &distillation.teacher);
        }
    }
}
