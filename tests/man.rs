//! The manual pages of section 3 are what the headers' comments say, and all
//! pages are well-formed. (That of the daemon is tested where its options are:
//! in src/bin/blkfused/manual.rs.)

#[path = "common/c_header.rs"]
mod c_header;
mod common;
#[path = "man_support/roff.rs"]
mod roff;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use c_header::{Header, Item, Kind};
use common::skip;
use roff::Page;

/// A page and what it describes.
struct Manual {
    name: &'static str,
    summary: &'static str,
    /// In include/.
    header: &'static str,
    /// Whether it begins with what the header begins with.
    intro: bool,
    /// Which of the header's items belong here.
    describes: fn(&Item) -> bool,
    see_also: &'static [&'static str],
}

const MANUALS: &[Manual] = &[
    Manual {
        name: "blkfuse",
        summary: "presents a block device as a regular file",
        header: "blkfuse.h",
        intro: true,
        describes: |item| !is_drivers(item),
        see_also: &[
            "blkfuse-driver(3)",
            "blkfuse-plugin(3)",
            "blkfused(1)",
            "fuse(4)",
        ],
    },
    Manual {
        name: "blkfuse-driver",
        summary: "what a program implements whose block device becomes a file",
        header: "blkfuse.h",
        intro: false,
        describes: is_drivers,
        see_also: &["blkfuse(3)", "blkfuse-plugin(3)"],
    },
    Manual {
        name: "blkfuse-plugin",
        summary: "block drivers that blkfused loads",
        header: "blkfuse-plugin.h",
        intro: true,
        describes: |_| true,
        see_also: &["blkfuse-driver(3)", "blkfuse(3)", "blkfused(1)"],
    },
];

/// Whether it is of what a driver implements, and not of what it calls.
fn is_drivers(item: &Item) -> bool {
    let structs = ["blkfuse_driver_ops", "blkfuse_limits", "blkfuse_extent"];
    let prefixes = ["BLKFUSE_EVENT_", "BLKFUSE_EXTENT_", "BLKFUSE_DRIVER_"];
    structs.contains(&item.name.as_str())
        || prefixes.iter().any(|prefix| item.name.starts_with(prefix))
        || [
            "BLKFUSE_API_VERSION",
            "BLKFUSE_MAY_UNMAP",
            "BLKFUSE_PENDING",
        ]
        .contains(&item.name.as_str())
        || item.kind == Kind::Inline
}

impl Manual {
    fn path(&self) -> PathBuf {
        in_package("man").join(format!("{}.3", self.name))
    }

    fn write(&self) -> String {
        let text = fs::read_to_string(in_package("include").join(self.header)).unwrap();
        let header = Header::parse(&text);
        let items = |kind: fn(&Kind) -> bool| {
            let chosen = header.items.iter().filter(|i| (self.describes)(i));
            chosen.filter(|i| kind(&i.kind)).collect::<Vec<_>>()
        };
        // Its first paragraph is the summary, its last one the licence.
        let (_, intro) = header.intro.split_once("\n\n").unwrap();
        let (intro, _) = intro.rsplit_once("\n\n").unwrap();
        // Commands that come first are the synopsis.
        let (commands, intro) = match intro.split_once("\n\n") {
            Some((commands, rest)) if commands.starts_with("  ") => (commands, rest),
            _ => ("cc program.c $(pkg-config --cflags --libs blkfuse)", intro),
        };
        let mut page = Page::new(self.name, 3, self.summary);
        page.section("SYNOPSIS");
        page.example(&format!(
            "#include <{}>\n\n{}",
            self.header,
            commands.trim_start().replace("\n  ", "\n")
        ));
        if self.intro {
            page.section("DESCRIPTION");
            page.doc(intro);
        }
        let described = |page: &mut Page, heading: &str, items: &[&Item]| {
            if !items.is_empty() {
                page.section(heading);
            }
            for item in items {
                page.described(&item.code, &item.doc);
            }
        };
        let functions = items(|kind| matches!(kind, Kind::Function));
        if !functions.is_empty() {
            page.section("FUNCTIONS");
        }
        for item in functions {
            page.subsection(&item.name);
            page.example(&item.code);
            page.doc(&item.doc);
        }
        let mut structs = items(|kind| matches!(kind, Kind::Struct(_)));
        // Those with callbacks come first.
        structs.sort_by_key(|item| !item.members().iter().any(|m| m.code.contains("(*")));
        if !structs.is_empty() {
            let name = if self.intro {
                "STRUCTURES"
            } else {
                "DESCRIPTION"
            };
            page.section(name);
        }
        for item in structs {
            page.subsection(&format!("struct {}", item.name));
            page.doc(&item.doc);
            for member in item.members() {
                // As far to the left as its first line.
                let code = member.code.replace("\n    ", "\n");
                page.described(&code, &member.doc);
            }
        }
        let types = items(|kind| matches!(kind, Kind::Opaque | Kind::Typedef));
        described(&mut page, "TYPES", &types);
        let macros = items(|kind| matches!(kind, Kind::Macro | Kind::Inline));
        described(&mut page, "CONSTANTS AND MACROS", &macros);
        page.see_also(self.see_also);
        page.finish()
    }
}

fn in_package(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn the_manual_pages_are_up_to_date() {
    for manual in MANUALS {
        let (path, page) = (manual.path(), manual.write());
        if std::env::var_os("BLKFUSE_UPDATE_MAN").is_some() {
            fs::write(&path, &page).unwrap();
        }
        assert!(
            fs::read_to_string(&path).unwrap_or_default() == page,
            "{} is not what include/{} says; update it with\n    \
             BLKFUSE_UPDATE_MAN=1 cargo test --test man --bin blkfused manual",
            path.display(),
            manual.header
        );
    }
}

#[test]
fn every_item_of_a_header_is_in_one_manual_page() {
    for (header, functions) in [("blkfuse.h", 20), ("blkfuse-plugin.h", 1)] {
        let text = fs::read_to_string(in_package("include").join(header)).unwrap();
        let parsed = Header::parse(&text);
        let pages: Vec<_> = MANUALS.iter().filter(|m| m.header == header).collect();
        let found = parsed.functions().count();
        assert!(found >= functions, "{header} was not understood");
        for item in &parsed.items {
            let times = pages.iter().filter(|m| (m.describes)(item)).count();
            assert_eq!(times, 1, "{}", item.name);
        }
    }
}

#[test]
fn man_has_nothing_against_the_manual_pages() {
    if Command::new("man").arg("--version").output().is_err() {
        return skip("there is no man");
    }
    let mut checked = 0;
    for entry in fs::read_dir(in_package("man")).unwrap() {
        let path = entry.unwrap().path();
        let output = Command::new("man")
            .args(["--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"])
            .arg(&path)
            .env("LC_ALL", "C.UTF-8")
            .env("MANROFFSEQ", "")
            .env("MANWIDTH", "80")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(warnings.is_empty(), "{}: {warnings}", path.display());
        checked += 1;
    }
    assert!(checked > MANUALS.len());
}
