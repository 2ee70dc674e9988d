//! `--report FILE`: what came out, to be read by people or programs.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bitnet_model::checkpoint::write_atomic;
use serde_json::Value;

use super::chart::Chart;
use crate::table::{Table, escape};

/// A report.
pub struct Page {
    /// Its heading.
    pub title: String,
    /// What was run, by name.
    pub facts: Vec<(&'static str, String)>,
    /// Pictures, which Markdown leaves out: they show what the tables say.
    pub charts: Vec<Chart>,
    /// Figures.
    pub tables: Vec<Table>,
    /// How to read them.
    pub notes: Vec<String>,
}

/// Kinds of report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Markdown,
    Html,
    Json,
}

/// The files of reports, whose names are known to be right.
pub struct Files(Vec<(PathBuf, Format)>);

impl Files {
    /// Takes the format from the ending of each name.
    ///
    /// # Errors
    /// Another ending.
    pub fn new(paths: &[PathBuf]) -> anyhow::Result<Self> {
        let format = |path: &PathBuf| {
            Ok(match path.extension().and_then(|extension| extension.to_str()) {
                Some("md") => (path.clone(), Format::Markdown),
                Some("html") => (path.clone(), Format::Html),
                Some("json") => (path.clone(), Format::Json),
                _ => bail!("--report {}: must end in .md, .html or .json", path.display()),
            })
        };
        paths.iter().map(format).collect::<anyhow::Result<_>>().map(Self)
    }

    /// Writes all of them; `page` is made only if one is for people.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, json: &Value, page: impl Fn() -> Page) -> anyhow::Result<()> {
        for (path, format) in &self.0 {
            let text = match format {
                Format::Markdown => page().markdown(),
                Format::Html => page().html()?,
                Format::Json => format!("{json:#}\n"),
            };
            write(path, &text)?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, text.as_bytes()).with_context(|| format!("--report {}", path.display()))
}

impl Page {
    fn markdown(&self) -> String {
        let mut text = format!("# {}\n\n", self.title);
        for (name, value) in &self.facts {
            text += &format!("- {name}: {value}\n");
        }
        for table in &self.tables {
            text += &format!("\n## {}\n\n{}", table.caption, table.markdown());
        }
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        text
    }

    /// One file with nothing outside of it: style and pictures are inside.
    fn html(&self) -> anyhow::Result<String> {
        let title = escape(&self.title);
        let mut text = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<dl>\n"
        );
        for (name, value) in &self.facts {
            text += &format!("<dt>{}</dt><dd>{}</dd>\n", escape(name), escape(value));
        }
        text += "</dl>\n";
        for (number, chart) in self.charts.iter().enumerate() {
            text += &format!("<figure>\n{}</figure>\n", chart.svg(number)?);
        }
        for table in &self.tables {
            // A region that scrolls can be reached by keyboard, and so has a name.
            text += &format!(
                "<div class=\"t\" role=\"region\" tabindex=\"0\" aria-label=\"{}\">\n{}</div>\n",
                escape(&table.caption),
                table.html()
            );
        }
        for note in &self.notes {
            text += &format!("<p>{}</p>\n", escape(note));
        }
        Ok(text + "</main>\n</body>\n</html>\n")
    }
}

/// Dark on white: #1a1a1a and #444 have contrasts of 17 and 9.7 to 1.
const STYLE: &str = "\
:root{color-scheme:light}\
body{margin:0;background:#fff;color:#1a1a1a;font:16px/1.5 system-ui,sans-serif}\
main{max-width:80rem;margin:0 auto;padding:1.5rem}\
h1{font-size:1.6rem;line-height:1.25}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}\
dt{color:#444}dd{margin:0;overflow-wrap:anywhere}\
figure{margin:1.5rem 0}svg{max-width:100%;height:auto}\
.t{overflow-x:auto;margin:1.5rem 0}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
caption{text-align:left;font-weight:600;padding:.3rem 0}\
th,td{padding:.25rem .6rem;text-align:left;border-bottom:1px solid #ccc;white-space:nowrap}\
thead th{border-bottom:2px solid #444}.n{text-align:right}";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::eval::chart::Mark;

    fn page() -> Page {
        let mut table = Table::new("Figures", &["Task", "Value"], &[1]);
        table.rows.push(["a|b", "0.5"].map(String::from).to_vec());
        let marks = vec![Mark {
            label: "a <b>".into(),
            value: 0.5,
            interval: Some((0.4, 0.6)),
            reference: Some(0.55),
        }];
        Page {
            title: "A & B".into(),
            facts: vec![("model", "<script>".into())],
            charts: vec![Chart {
                title: "Accuracy".into(),
                axis: "part".into(),
                marks,
                span: None,
            }],
            tables: vec![table],
            notes: vec!["How to read.".into()],
        }
    }

    #[test]
    fn a_page_stands_alone_and_is_escaped() {
        let html = page().html().unwrap();
        assert!(html.contains("<h1>A &amp; B</h1>") && html.contains("<dd>&lt;script&gt;</dd>"));
        assert!(!html.contains("<script") && !html.contains("href=") && !html.contains("src="));
        // Every picture has a name and says in words what it shows.
        assert!(html.contains("role=\"img\" aria-labelledby=\"chart0 chart0d\""), "{html}");
        assert!(html.contains("<title id=\"chart0\">Accuracy</title>"), "{html}");
        assert!(html.contains("a &lt;b&gt;: 0.5 (0.4 to 0.6), published 0.55"), "{html}");
    }

    #[test]
    fn markdown_has_the_same_tables() {
        let text = page().markdown();
        assert!(
            text.starts_with("# A & B\n\n- model: <script>\n\n## Figures\n\n|Task|Value|"),
            "{text}"
        );
        // A bar in a cell would be another column.
        assert!(text.contains("|a\\|b|"), "{text}");
    }

    #[test]
    fn endings_tell_formats() {
        assert!(Files::new(&["a.md", "a.html", "a.json"].map(PathBuf::from)).is_ok());
        let error = Files::new(&["a.pdf".into()]).err().unwrap().to_string();
        assert!(error.contains("--report a.pdf: must end in .md, .html or .json"), "{error}");
    }
}
