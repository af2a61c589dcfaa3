//! The test that the manual page blkfused(1) is what the command line says.

use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::cli;

/// What clap_mangen begins everything with; once is enough.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

fn page() -> String {
    let command = cli::command();
    let after = command.get_after_help().expect("it has one").to_string();
    let man = Man::new(command);
    let mut page = format!(
        ".\\\" Generated; do not edit.\n{PREAMBLE}\
         .TH BLKFUSED 1 \"\" \"blkfuse {}\" \"User commands\"\n",
        env!("CARGO_PKG_VERSION")
    );
    for section in [
        Man::render_name_section,
        Man::render_synopsis_section,
        Man::render_description_section,
        Man::render_options_section,
    ] {
        let mut text = Vec::new();
        section(&man, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        page.push_str(text.strip_prefix(PREAMBLE).expect("the preamble"));
    }
    // Its paragraphs are the further sections.
    let after = after.split("\n\n").map(|paragraph| {
        let parts = paragraph.split_once(": ");
        parts.expect("what follows the options is `Heading: text`")
    });
    let see_also = (
        "See also",
        "blkfuse(3), blkfuse-plugin(3), fusermount3(1), fuse(4)",
    );
    for (heading, text) in after.chain([see_also]) {
        let mut section = Roff::new();
        section.control("SH", [heading.to_uppercase().as_str()]);
        section.text([roman(text)]);
        page.push_str(&section.to_roff());
    }
    // What is literal there is in backticks, as everywhere in Rust's comments.
    let parts = page.split('`').enumerate();
    let marked = parts.map(|(at, part)| match at % 2 {
        0 => part.to_owned(),
        _ => format!("\\fB{part}\\fR"),
    });
    marked.collect()
}

#[test]
fn the_page_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/man/blkfused.1");
    let page = page();
    if std::env::var_os("BLKFUSE_UPDATE_MAN").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    assert!(
        std::fs::read_to_string(path).unwrap_or_default() == page,
        "man/blkfused.1 is not what src/bin/blkfused/cli.rs says; update it with\n    \
         BLKFUSE_UPDATE_MAN=1 cargo test --test man --bin blkfused manual"
    );
}
