//! What all pictures share.

use std::error::Error;

use anyhow::{anyhow, bail};
use plotters::{drawing::DrawingAreaErrorKind, style::FontStyle};

/// The font of all texts, once it is [registered](register_font).
pub const FONT: &str = "sans-serif";

/// Makes [`FONT`] the one inside this program, whatever fonts the system has.
///
/// # Errors
/// It cannot be read.
pub fn register_font() -> anyhow::Result<()> {
    let font = dejavu::sans::regular();
    match plotters::style::register_font(FONT, FontStyle::Normal, font) {
        Ok(()) => Ok(()),
        Err(_) => bail!("the font cannot be read"),
    }
}

/// An error of drawing as one of this program.
pub fn of_backend<E: Error + Send + Sync>(error: DrawingAreaErrorKind<E>) -> anyhow::Error {
    anyhow!("{error}")
}
