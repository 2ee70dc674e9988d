//! Values with their intervals, one below the other, as SVG.

use anyhow::{Context, bail};
use plotters::{
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use crate::{
    picture::{FONT, of_backend, register_font},
    table::escape,
};

/// A diagram.
pub struct Chart {
    /// What it shows.
    pub title: String,
    /// What its axis counts.
    pub axis: String,
    /// From the top down.
    pub marks: Vec<Mark>,
    /// What the axis spans at least; all that is drawn if it is `None`.
    pub span: Option<(f64, f64)>,
}

/// A value.
pub struct Mark {
    /// Its name.
    pub label: String,
    /// Where its dot is.
    pub value: f64,
    /// Where its line begins and ends.
    pub interval: Option<(f64, f64)>,
    /// Where another's is.
    pub reference: Option<f64>,
}

const TEXT: u32 = 15;
const WIDTH: u32 = 900;
const LABELS: u32 = 300;
const ROW: u32 = 28;
/// Above and below the rows.
const FRAME: (u32, u32) = (16, 56);
/// Two of Okabe and Ito's colours, which the colour-blind can tell apart; their marks differ in shape, too.
const OURS: RGBColor = RGBColor(0, 114, 178);
const THEIRS: RGBColor = RGBColor(213, 94, 0);

impl Chart {
    /// An `svg` element, with its title and all that it shows in words. `number` tells it from others of the same page.
    ///
    /// # Errors
    /// No font.
    pub fn svg(&self, number: usize) -> anyhow::Result<String> {
        let mut svg = String::new();
        let height = FRAME.0 + FRAME.1 + ROW * self.marks.len() as u32;
        let drawn = self.draw(SVGBackend::with_string(&mut svg, (WIDTH, height)));
        drawn.context("the picture cannot be drawn")?;
        let Some((head, body)) = svg.split_once('>').map(|(head, body)| (head.to_owned(), body))
        else {
            bail!("the picture has no beginning");
        };
        let (title, id) = (escape(&self.title), format!("chart{number}"));
        let said = escape(&self.description());
        Ok(format!(
            "{head} role=\"img\" aria-labelledby=\"{id} {id}d\">\n<title id=\"{id}\">{title}</title>\n\
             <desc id=\"{id}d\">{said}</desc>{body}"
        ))
    }

    /// All that is drawn, in words.
    fn description(&self) -> String {
        let mark = |mark: &Mark| {
            let mut text = format!("{}: {}", mark.label, short(mark.value));
            if let Some((low, high)) = mark.interval {
                text += &format!(" ({} to {})", short(low), short(high));
            }
            if let Some(reference) = mark.reference {
                text += &format!(", published {}", short(reference));
            }
            text
        };
        format!("{}. {}", self.axis, Vec::from_iter(self.marks.iter().map(mark)).join("; "))
    }

    fn span(&self) -> (f64, f64) {
        let drawn = self.marks.iter().flat_map(|mark| {
            let (low, high) = mark.interval.unwrap_or((mark.value, mark.value));
            [Some(mark.value), Some(low), Some(high), mark.reference].into_iter().flatten()
        });
        let span = self.span.unwrap_or((f64::INFINITY, f64::NEG_INFINITY));
        let (low, high) = drawn.fold(span, |(low, high), x| (low.min(x), high.max(x)));
        let room = 0.03 * (high - low).max(1e-9);
        if low <= high { (low - room, high + room) } else { (0., 1.) }
    }

    fn draw(&self, backend: SVGBackend<'_>) -> anyhow::Result<()> {
        register_font()?;
        let root = backend.into_drawing_area();
        root.fill(&WHITE).map_err(of_backend)?;
        let (low, high) = self.span();
        let rows = self.marks.len() as f64;
        let mut chart = ChartBuilder::on(&root)
            .margin_top(FRAME.0)
            .margin_left(LABELS)
            .margin_right(24)
            .x_label_area_size(FRAME.1)
            .build_cartesian_2d(low..high, 0. ..rows)
            .map_err(of_backend)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_labels(8)
            .max_light_lines(1)
            .bold_line_style(BLACK.mix(0.14))
            .light_line_style(TRANSPARENT)
            .axis_style(BLACK.mix(0.6))
            .x_desc(&self.axis)
            .x_label_formatter(&|&x| short(x))
            .label_style((FONT, TEXT))
            .axis_desc_style((FONT, TEXT))
            .draw()
            .map_err(of_backend)?;
        if low < 0. && high > 0. {
            let zero = PathElement::new(vec![(0., 0.), (0., rows)], BLACK.stroke_width(2));
            chart.draw_series([zero]).map_err(of_backend)?;
        }
        let text = (FONT, TEXT).into_font().color(&BLACK).pos(Pos::new(HPos::Right, VPos::Center));
        for (row, mark) in self.marks.iter().enumerate() {
            let y = rows - row as f64 - 0.5;
            let (_, pixel) = chart.backend_coord(&(low, y));
            let place = (LABELS as i32 - 12, pixel);
            root.draw(&Text::new(mark.label.clone(), place, text.clone())).map_err(of_backend)?;
            if let Some((from, to)) = mark.interval {
                let line = PathElement::new(vec![(from, y), (to, y)], OURS.stroke_width(3));
                chart.draw_series([line]).map_err(of_backend)?;
            }
            chart
                .draw_series([Circle::new((mark.value, y), 5, OURS.filled())])
                .map_err(of_backend)?;
            if let Some(reference) = mark.reference {
                let cross = Cross::new((reference, y), 6, THEIRS.stroke_width(3));
                chart.draw_series([cross]).map_err(of_backend)?;
            }
        }
        root.present().map_err(of_backend)
    }
}

/// Four digits behind the point at most.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}
