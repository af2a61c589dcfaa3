//! The C header: up to date, complete, and what the shared library exports.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::skip;

const GENERATED: &str = include_str!(concat!(env!("OUT_DIR"), "/blkfuse.h"));

fn in_package(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn the_header_is_up_to_date() {
    let path = in_package("include/blkfuse.h");
    if std::env::var_os("BLKFUSE_UPDATE_HEADER").is_some() {
        fs::write(&path, GENERATED).unwrap();
    }
    let present = fs::read_to_string(&path).unwrap_or_default();
    let differs = present
        .lines()
        .zip(GENERATED.lines())
        .position(|(old, new)| old != new);
    assert!(
        present == GENERATED,
        "include/blkfuse.h is not what src/capi says (from line {}); update it with\n    \
         BLKFUSE_UPDATE_HEADER=1 cargo test --test header",
        differs.map_or(present.lines().count(), |line| line) + 1
    );
}

/// The text without comments.
fn code(header: &str) -> String {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, comment)) = rest.split_once("/*") {
        code.push_str(before);
        rest = comment.split_once("*/").expect("comments end").1;
    }
    code.push_str(rest);
    let without_lines = code.lines().map(|l| l.split("//").next().unwrap_or(""));
    without_lines.collect::<Vec<_>>().join("\n")
}

/// The functions that the header declares: what stands in its extern "C".
fn declared(header: &str) -> BTreeSet<String> {
    let code = code(header);
    let (_, functions) = code.split_once("extern \"C\" {\n#endif").unwrap();
    let (functions, _) = functions.split_once("#ifdef __cplusplus").unwrap();
    let declarations = functions.split(';').map(str::trim);
    declarations
        .filter(|d| !d.is_empty())
        .map(|declaration| {
            let (before, _) = declaration.split_once('(').expect("a function");
            let name = before.rsplit([' ', '*', '\n']).next().unwrap();
            assert!(name.starts_with("blkfuse_"), "{declaration}");
            name.to_owned()
        })
        .collect()
}

#[test]
fn the_shared_library_exports_what_the_header_declares_and_nothing_else() {
    let library = common::library_dir().join("libblkfuse.so");
    let Ok(output) = Command::new("nm")
        .args(["-D", "--defined-only", "--format=posix"])
        .arg(&library)
        .output()
    else {
        return skip("there is no nm");
    };
    assert!(output.status.success(), "{output:?}");
    let exported: BTreeSet<String> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    let declared = declared(GENERATED);
    assert!(
        declared.contains("blkfuse_export_create"),
        "the header was understood: {declared:?}"
    );
    assert_eq!(exported, declared);
}

#[test]
fn the_shared_library_has_its_soname() {
    let library = common::library_dir().join("libblkfuse.so");
    let Ok(output) = Command::new("readelf").arg("-d").arg(&library).output() else {
        return skip("there is no readelf");
    };
    let dynamic = String::from_utf8(output.stdout).unwrap();
    let soname = dynamic.lines().find(|l| l.contains("(SONAME)"));
    assert!(
        soname.is_some_and(|l| l.ends_with("[libblkfuse.so.0]")),
        "{soname:?}"
    );
}

/// Key, type, and whether it can be set, of each property in the table.
fn properties() -> Vec<(String, &'static str, bool)> {
    let source = fs::read_to_string(in_package("src/properties.rs")).unwrap();
    let (_, table) = source.split_once("PROPERTIES: &[Property] = &[").unwrap();
    let (table, _) = table.split_once("\n];").unwrap();
    table
        .split("Property {")
        .skip(1)
        .map(|property| {
            let field = |name: &str| {
                let (_, value) = property.split_once(&format!("{name}: ")).expect(name);
                value.split_once(',').expect(name).0.trim()
            };
            let kind = match field("kind") {
                "Kind::Bool" => "bool",
                "Kind::U64" => "u64",
                "Kind::Str" => "str",
                other => panic!("unknown kind {other}"),
            };
            let key = field("key").trim_matches('"').to_owned();
            (key, kind, field("set") != "None")
        })
        .collect()
}

#[test]
fn the_header_describes_every_property() {
    let properties = properties();
    assert!(properties.len() > 5, "the table was understood");
    let text = GENERATED.replace("\n * ", " ");
    let (_, list) = text
        .split_once("Sets a property before the start.")
        .unwrap();
    let (list, _) = list.split_once("# Safety").unwrap();
    for (key, kind, settable) in properties {
        let (rows, facts) = list.split_once("These can only be read:").unwrap();
        let described = if settable {
            rows.split(" |")
                .collect::<Vec<_>>()
                .windows(2)
                .any(|cells| {
                    let cell = |i: usize| cells[i].trim_start_matches('|').trim();
                    cell(0) == key && cell(1) == kind
                })
        } else {
            [")", ":", ","]
                .iter()
                .any(|end| facts.contains(&format!(" {key} ({kind}{end}")))
        };
        assert!(
            described,
            "the description of blkfuse_export_set_bool() lacks \"{key}\" ({kind}, {})",
            if settable { "settable" } else { "read-only" }
        );
    }
}
