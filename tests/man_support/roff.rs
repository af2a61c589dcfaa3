//! Writes manual pages: what the comments of a header say, in troff's words.

use std::fmt::Write as _;

/// A page in the making.
pub struct Page {
    text: String,
}

impl Page {
    pub fn new(name: &str, section: u32, summary: &str) -> Self {
        let mut page = Self {
            text: String::from(".\\\" Generated; do not edit.\n"),
        };
        let title = name.to_uppercase();
        let version = env!("CARGO_PKG_VERSION");
        page.request(&format!(
            ".TH {title} {section} \"\" \"blkfuse {version}\" \"Library functions\""
        ));
        page.section("NAME");
        page.request(&format!("{} \\- {}", code(name), plain(summary)));
        page
    }

    pub fn section(&mut self, heading: &str) {
        self.request(&format!(".SH {heading}"));
    }

    pub fn subsection(&mut self, heading: &str) {
        self.request(&format!(".SS {}", code(heading)));
    }

    /// Lines that stay as they are.
    pub fn example(&mut self, lines: &str) {
        self.request(".PP");
        self.verbatim(lines);
    }

    fn verbatim(&mut self, lines: &str) {
        self.request(".nf");
        for line in lines.lines() {
            self.line(&code(line));
        }
        self.request(".fi");
    }

    /// A piece of C with its description below.
    pub fn described(&mut self, what: &str, doc: &str) {
        self.example(what);
        self.request(".RS 4");
        self.doc(doc);
        self.request(".RE");
    }

    /// The text of a comment: paragraphs; lists; tables; headings, which are
    /// put before their paragraph; and what is indented, which stays as it is.
    pub fn doc(&mut self, text: &str) {
        let mut lines = text.lines().peekable();
        let mut inside = Inside::Nothing;
        let mut heading = None;
        while let Some(line) = lines.next() {
            let indented = line.starts_with("  ");
            if line.is_empty() {
                inside = Inside::Nothing;
            } else if let Some(title) = line.strip_prefix("# ") {
                heading = Some(title);
            } else if line.starts_with('|') {
                let mut rows = vec![cells(line)];
                while let Some(row) = lines.next_if(|line| line.starts_with('|')) {
                    rows.push(cells(row));
                }
                self.table(&rows);
            } else if let Some(item) = line.strip_prefix("- ") {
                self.request(".IP \\(bu 2");
                self.line(&marked(item));
                inside = Inside::Item;
            } else if indented && inside == Inside::Item {
                self.line(&marked(line.trim_start()));
            } else if indented {
                let mut kept = String::from(&line[2..]);
                while let Some(more) = lines.next_if(|line| line.starts_with("  ")) {
                    kept.push('\n');
                    kept.push_str(&more[2..]);
                }
                self.request(".RS 4");
                self.example(&kept);
                self.request(".RE");
                inside = Inside::Nothing;
            } else {
                if inside != Inside::Paragraph {
                    self.request(".PP");
                    inside = Inside::Paragraph;
                }
                let heading = heading.take();
                let heading = heading.map(|title| format!("\\fI{}:\\fR ", plain(title)));
                self.line(&(heading.unwrap_or_default() + &marked(line)));
            }
        }
    }

    /// A table as a list: the first cell of each row with the last below; those
    /// between are in brackets, the second as it is, further ones by name.
    fn table(&mut self, rows: &[Vec<&str>]) {
        let [head, _, rows @ ..] = rows else {
            panic!("a table has a head");
        };
        for row in rows {
            let [first, between @ .., last] = &row[..] else {
                panic!("a row has more than one cell");
            };
            let mut facts = Vec::new();
            for (at, fact) in between.iter().enumerate().filter(|(_, f)| !f.is_empty()) {
                facts.push(match at {
                    0 => plain(fact),
                    _ => format!("{} {}", plain(head[at + 1]), code(fact)),
                });
            }
            self.request(".TP");
            self.line(&format!("{} ({})", bold(first), facts.join(", ")));
            self.line(&marked(last));
        }
    }

    pub fn see_also(&mut self, pages: &[&str]) {
        self.section("SEE ALSO");
        let pages: Vec<_> = pages.iter().map(|page| marked(page)).collect();
        self.line(&pages.join(",\n"));
    }

    /// A line of text.
    fn line(&mut self, line: &str) {
        let guard = if line.starts_with(['.', '\'']) {
            "\\&"
        } else {
            ""
        };
        writeln!(self.text, "{guard}{line}").unwrap();
    }

    /// A line as it is.
    fn request(&mut self, line: &str) {
        writeln!(self.text, "{line}").unwrap();
    }

    pub fn finish(self) -> String {
        self.text
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Inside {
    Nothing,
    Paragraph,
    Item,
}

fn cells(row: &str) -> Vec<&str> {
    let row = row.trim().trim_matches('|');
    row.split('|').map(str::trim).collect()
}

/// Text, in which a hyphen is one.
fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut before = ' ';
    for c in text.chars() {
        match c {
            // The sign of a number or an errno, or an arrow.
            '-' if !before.is_alphanumeric() => out.push_str("\\-"),
            '\\' => out.push_str("\\e"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            c => out.push(c),
        }
        before = c;
    }
    out
}

/// Text that somebody may copy.
fn code(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '-' => out.push_str("\\-"),
            '\\' => out.push_str("\\e"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            c => out.push(c),
        }
    }
    out
}

fn bold(text: &str) -> String {
    format!("\\fB{}\\fR", code(text))
}

/// Before a word that must not be broken at the end of a line.
const UNBROKEN: &str = "\\%";

/// Text in which names of the API, and of other manual pages, are bold, and
/// what is in backticks is italic.
fn marked(text: &str) -> String {
    let mut out = String::new();
    for (at, part) in text.split('`').enumerate() {
        if at % 2 == 1 {
            write!(out, "{UNBROKEN}\\fI{}\\fR", code(part)).unwrap();
            continue;
        }
        let mut rest = part;
        while let Some((start, end)) = name_in(rest) {
            out.push_str(&plain(&rest[..start]));
            out.push_str(UNBROKEN);
            out.push_str(&bold(&rest[start..end]));
            rest = &rest[end..];
        }
        out.push_str(&plain(rest));
    }
    out
}

/// Where the next name is that is to be bold.
fn name_in(text: &str) -> Option<(usize, usize)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let mut from = 0;
    while let Some(start) = text[from..].find(is_word) {
        let start = from + start;
        let rest = &text[start..];
        let end = start + rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        let word = &text[start..end];
        let mut after = text[end..].chars();
        let is_page = after.next() == Some('(')
            && after.next().is_some_and(|c| c.is_ascii_digit())
            && after.next() == Some(')');
        if is_page || word.starts_with("blkfuse_") || word.starts_with("BLKFUSE_") {
            return Some((start, end));
        }
        from = end;
    }
    None
}
