//! A table, as Markdown and as HTML.

/// Rows of texts under a header.
pub struct Table {
    /// What it is about.
    pub caption: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// As many cells each.
    pub rows: Vec<Vec<String>>,
    /// Columns that are flush right.
    pub numbers: &'static [usize],
}

impl Table {
    /// An empty one.
    pub fn new(caption: &str, header: &[&str], numbers: &'static [usize]) -> Self {
        let header = header.iter().map(ToString::to_string).collect();
        Self { caption: caption.into(), header, rows: Vec::new(), numbers }
    }

    /// With all columns as wide as their widest cell.
    pub fn markdown(&self) -> String {
        let columns = 0..self.header.len();
        let all = std::iter::once(&self.header).chain(&self.rows);
        // A bar would end its cell.
        let all = all.map(|row| Vec::from_iter(row.iter().map(|cell| cell.replace('|', "\\|"))));
        let all = Vec::from_iter(all);
        let length = |row: &Vec<String>, column: usize| row[column].chars().count();
        let width = |column| all.iter().map(|row| length(row, column)).max().unwrap_or(0);
        let widths = Vec::from_iter(columns.clone().map(|column| width(column).max(3)));
        let is_number = |column| self.numbers.contains(&column);
        let line = |cell: &dyn Fn(usize) -> String| {
            let cells = columns.clone().map(|column| cell(column) + "|");
            format!("|{}\n", cells.collect::<String>())
        };
        let mut text = line(&|column| format!("{:^w$}", all[0][column], w = widths[column]));
        text += &line(&|column| {
            let end = if is_number(column) { ":" } else { "-" };
            "-".repeat(widths[column] - 1) + end
        });
        for row in &all[1..] {
            text += &line(&|column| match is_number(column) {
                true => format!("{:>w$}", row[column], w = widths[column]),
                false => format!("{:<w$}", row[column], w = widths[column]),
            });
        }
        text
    }

    /// As an element of a page.
    pub fn html(&self) -> String {
        let class = |column| if self.numbers.contains(&column) { " class=\"n\"" } else { "" };
        let mut text =
            format!("<table>\n<caption>{}</caption>\n<thead><tr>", escape(&self.caption));
        for (column, name) in self.header.iter().enumerate() {
            text += &format!("<th scope=\"col\"{}>{}</th>", class(column), escape(name));
        }
        text += "</tr></thead>\n<tbody>\n";
        for row in &self.rows {
            text += "<tr>";
            for (column, cell) in row.iter().enumerate() {
                text += &format!("<td{}>{}</td>", class(column), escape(cell));
            }
            text += "</tr>\n";
        }
        text + "</tbody>\n</table>\n"
    }
}

/// The text inside an element or an attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("Two & one", &["Task", "Value"], &[1]);
        table.rows.push(["a<b", "0.5"].map(String::from).to_vec());
        table.rows.push(["é", "12.25"].map(String::from).to_vec());
        let expected = "|Task|Value|\n|----|----:|\n|a<b |  0.5|\n|é   |12.25|\n";
        assert_eq!(table.markdown(), expected);
        let html = table.html();
        assert!(html.contains("<caption>Two &amp; one</caption>"), "{html}");
        assert!(html.contains("<tr><td>a&lt;b</td><td class=\"n\">0.5</td></tr>"), "{html}");
    }
}
