//! Panels of curves as a PNG or SVG picture.

use std::ops::Range;

use plotters::{
    coord::{
        Shift,
        ranged1d::{AsRangedCoord, Ranged, ValueFormatter},
    },
    prelude::*,
};

use super::{
    curves::{Run, smooth, thin},
    panels::Panel,
};
use crate::picture::{FONT, of_backend, register_font};

/// Kinds of picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Pixels.
    Png,
    /// Lines and text.
    Svg,
}

/// What is drawn.
pub struct Picture<'a> {
    /// A colour each.
    pub runs: &'a [Run],
    /// A diagram each.
    pub panels: &'a [Panel],
    /// Under the horizontal axes.
    pub x_label: &'a str,
    /// Points that are averaged; by default a fiftieth of a noisy curve.
    pub smooth: Option<usize>,
    /// Whether the horizontal and the vertical axes are logarithmic.
    pub log: (bool, bool),
    /// Panels side by side; by default a square of panels.
    pub columns: Option<usize>,
}

const PANEL: (usize, usize) = (760, 480);
const MARGIN: usize = 16;
const LEGEND_LINE: usize = 34;
const TITLE_SIZE: u32 = 24;
const TEXT_SIZE: u32 = 19;

/// A curve has no more points than a panel has pixels.
const POINTS: usize = 1400;

/// A noisy curve is smoothed over so many stretches.
const STRETCHES: usize = 50;

/// Okabe and Ito's colours, which the colour-blind can tell apart, the bright yellow last.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(70, 70, 70),
    RGBColor(214, 200, 30),
];

type Area<'a, B> = DrawingArea<B, Shift>;

impl Picture<'_> {
    /// The bytes of the picture.
    ///
    /// # Errors
    /// Nothing to draw, or a picture too large.
    pub fn draw(&self, format: Format) -> anyhow::Result<Vec<u8>> {
        register_font()?;
        let columns =
            self.columns.unwrap_or_else(|| (self.panels.len() as f64).sqrt().ceil() as usize);
        let columns = columns.clamp(1, self.panels.len().max(1));
        let rows = self.panels.len().div_ceil(columns);
        let width = (PANEL.0 * columns + 2 * MARGIN) as u32;
        let legend = self.legend(width);
        let legend_height = LEGEND_LINE * legend.last().map_or(0, |entry| entry.line + 1);
        let height = (PANEL.1 * rows + 2 * MARGIN + legend_height) as u32;
        let split = (legend_height + MARGIN) as i32;
        match format {
            Format::Svg => {
                let mut text = String::new();
                {
                    let root =
                        SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
                    self.fill(&root, &legend, split, (rows, columns))?;
                }
                Ok(text.into_bytes())
            }
            Format::Png => {
                let mut pixels = vec![0; 3 * width as usize * height as usize];
                {
                    let root = BitMapBackend::with_buffer(&mut pixels, (width, height));
                    self.fill(&root.into_drawing_area(), &legend, split, (rows, columns))?;
                }
                encode(&pixels, (width, height))
            }
        }
    }

    fn fill<B: DrawingBackend>(
        &self,
        root: &Area<B>,
        legend: &[Entry],
        split: i32,
        grid: (usize, usize),
    ) -> anyhow::Result<()> {
        root.fill(&WHITE).map_err(of_backend)?;
        let (top, rest) = root.split_vertically(split);
        for (run, entry) in self.runs.iter().zip(legend) {
            let y = (MARGIN + LEGEND_LINE * entry.line + LEGEND_LINE / 2) as i32;
            let line = vec![(entry.x, y), (entry.x + 28, y)];
            let style = colour(entry.run).stroke_width(4);
            top.draw(&PathElement::new(line, style)).map_err(of_backend)?;
            let style = (FONT, TEXT_SIZE).into_font().color(&BLACK);
            // The middle of small letters is a third of the size above their foot.
            let text = Text::new(run.name.clone(), (entry.x + 38, y - TEXT_SIZE as i32 / 2), style);
            top.draw(&text).map_err(of_backend)?;
        }
        let inner = rest.margin(0, MARGIN as u32, MARGIN as u32, MARGIN as u32);
        for (area, panel) in inner.split_evenly(grid).iter().zip(self.panels) {
            self.panel(area, panel)?;
        }
        Ok(())
    }

    /// Where the names of the runs stand, in lines of `width`.
    fn legend(&self, width: u32) -> Vec<Entry> {
        let (mut x, mut line) = (MARGIN as i32, 0);
        let mut entries = Vec::new();
        for (run, Run { name, .. }) in self.runs.iter().enumerate() {
            let text = (FONT, TEXT_SIZE).into_font().layout_box(name);
            let text = text.map_or(name.len() as i32 * 12, |((left, _), (right, _))| right - left);
            let needed = 38 + text + 36;
            if x + needed > width as i32 - MARGIN as i32 && x > MARGIN as i32 {
                (x, line) = (MARGIN as i32, line + 1);
            }
            entries.push(Entry { run, x, line });
            x += needed;
        }
        entries
    }

    fn panel<B: DrawingBackend>(&self, area: &Area<B>, panel: &Panel) -> anyhow::Result<()> {
        let lines = self.lines(panel);
        let points = || lines.iter().flat_map(|line| &line.points);
        let x = span(points().map(|point| point.0), self.log.0);
        let y = span(points().map(|point| point.1), self.log.1);
        let area = area.margin(8, 8, 8, 8);
        match self.log {
            (false, false) => self.axes(&area, panel, &lines, x, y),
            (true, false) => self.axes(&area, panel, &lines, x.log_scale(), y),
            (false, true) => self.axes(&area, panel, &lines, x, y.log_scale()),
            (true, true) => self.axes(&area, panel, &lines, x.log_scale(), y.log_scale()),
        }
    }

    /// The curves of a panel: raw and faint those that are smoothed, then what is to be read.
    fn lines(&self, panel: &Panel) -> Vec<Line> {
        let (mut raw, mut clear) = (Vec::new(), Vec::new());
        let is_drawn = |&(x, y): &(f64, f64)| {
            let fits = |value: f64, log: bool| value.is_finite() && (!log || value > 0.);
            fits(x, self.log.0) && fits(y, self.log.1)
        };
        for (part, curve) in panel.curves.iter().enumerate() {
            for (run, points) in self.runs.iter().enumerate() {
                let Some(points) = points.curves.get(curve) else { continue };
                let points: Vec<(f64, f64)> = points.iter().copied().filter(is_drawn).collect();
                let default = if panel.is_noisy { points.len() / STRETCHES } else { 1 };
                let window = self.smooth.unwrap_or(default);
                let width = if part == 0 { 3 } else { 1 };
                let line = |points: &[(f64, f64)], opacity, width| {
                    let points = thin(points, POINTS);
                    Line { points, style: colour(run).mix(opacity).stroke_width(width) }
                };
                if window > 1 {
                    raw.push(line(&points, 0.25, 1));
                    clear.push(line(&smooth(&points, window), 1., width));
                } else {
                    clear.push(line(&points, 1., width));
                }
            }
        }
        raw.append(&mut clear);
        raw
    }

    fn axes<B, X, Y>(
        &self,
        area: &Area<B>,
        panel: &Panel,
        lines: &[Line],
        x: X,
        y: Y,
    ) -> anyhow::Result<()>
    where
        B: DrawingBackend,
        X: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
        Y: AsRangedCoord<Value = f64, CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>>,
    {
        let mut chart = ChartBuilder::on(area)
            .caption(&panel.title, (FONT, TITLE_SIZE))
            .x_label_area_size(54)
            .y_label_area_size(84)
            .margin_right(24)
            .build_cartesian_2d(x, y)
            .map_err(of_backend)?;
        chart
            .configure_mesh()
            .x_desc(self.x_label)
            .x_labels(7)
            .y_labels(7)
            .max_light_lines(1)
            .bold_line_style(BLACK.mix(0.14))
            .light_line_style(TRANSPARENT)
            .axis_style(BLACK.mix(0.6))
            .label_style((FONT, TEXT_SIZE))
            .axis_desc_style((FONT, TEXT_SIZE))
            .x_label_formatter(&|&x| number(x))
            .y_label_formatter(&|&y| number(y))
            .draw()
            .map_err(of_backend)?;
        for Line { points, style } in lines {
            if let [point] = points[..] {
                chart.draw_series([Circle::new(point, 5, style.filled())]).map_err(of_backend)?;
            } else {
                let series = LineSeries::new(points.iter().copied(), *style);
                chart.draw_series(series).map_err(of_backend)?;
            }
        }
        Ok(())
    }
}

/// A run in the legend.
struct Entry {
    run: usize,
    x: i32,
    line: usize,
}

/// One curve as it is drawn.
struct Line {
    points: Vec<(f64, f64)>,
    style: ShapeStyle,
}

fn colour(run: usize) -> RGBColor {
    COLOURS[run % COLOURS.len()]
}

/// What an axis spans: all values and a little more, and something where there is nothing.
fn span(values: impl Iterator<Item = f64>, log: bool) -> Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return if log { 0.1..1. } else { 0. ..1. };
    }
    if log {
        let room = (high / low).powf(0.03).max(1.05);
        return low / room..high * room;
    }
    // A constant gets the room of its own size, and a curve does not stand on the frame.
    let room = match high - low {
        0. => {
            if high == 0. {
                1.
            } else {
                high.abs() * 0.5
            }
        }
        width => width * 0.04,
    };
    low - room..high + room
}

/// A number beside an axis: three digits, with `k`, `M` and `G` for large and an exponent for small ones.
fn number(value: f64) -> String {
    let size = value.abs();
    let short = |value: f64| {
        let text = format!("{value:.3}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    match size {
        0. => "0".into(),
        1e9.. => short(value / 1e9) + "G",
        1e6.. => short(value / 1e6) + "M",
        1e4.. => short(value / 1e3) + "k",
        1e-2.. => short(value),
        // Ticks are sums, so 3e-4 may be 3.0000000000000003e-4.
        _ => {
            let text = format!("{value:.2e}");
            let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let digits = digits.trim_end_matches('0').trim_end_matches('.');
            if size < 1e-12 { "0".into() } else { format!("{digits}e{exponent}") }
        }
    }
}

/// RGB pixels as a PNG file.
fn encode(pixels: &[u8], (width, height): (u32, u32)) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0., "0"),
            (0.30000000000000004, "0.3"),
            (-2.5, "-2.5"),
            (1500., "1500"),
            (12_000., "12k"),
            (2.5e6, "2.5M"),
            (1e9, "1G"),
            (3.0000000000000003e-4, "3e-4"),
            (1.25e-3, "1.25e-3"),
            (1e-17, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn spans_hold_their_values_and_are_never_empty() {
        for values in [&[][..], &[0.], &[3.], &[-1., 2.], &[1e-9, 1e9]] {
            for log in [false, true] {
                let positive = values.iter().copied().filter(|&v| !log || v > 0.);
                let span = span(positive.clone(), log);
                assert!(span.start < span.end && (!log || span.start > 0.), "{span:?}");
                assert!(positive.clone().all(|value| span.contains(&value)), "{span:?}");
            }
        }
    }
}
