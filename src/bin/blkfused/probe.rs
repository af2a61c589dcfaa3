//! Recognising image formats that must not be served as raw by accident.
//!
//! A guest that writes another format's header into a raw image could
//! otherwise decide how the image is read the next time, and somebody who
//! forgets to convert an image would export its inside out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// How much of an image's beginning is looked at.
const HEAD: usize = 4096;
/// How much of an image's end: VHD and DMG put a block of their own there.
const TAIL: usize = 512;

/// Names the format that `file`, which is `length` bytes long, looks like;
/// `None` if it is nothing but raw.
pub fn probe(file: &File, length: u64) -> io::Result<Option<&'static str>> {
    let head = read_some(file, 0, HEAD)?;
    let tail = read_some(file, length.saturating_sub(TAIL as u64), TAIL)?;
    Ok(format_of(&head, &tail))
}

/// Reads up to `len` bytes at `offset`, fewer only at the end of the file.
fn read_some(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    let mut done = 0;
    while done < len {
        match file.read_at(&mut data[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    data.truncate(done);
    Ok(data)
}

fn format_of(head: &[u8], tail: &[u8]) -> Option<&'static str> {
    /// Format, place of its signature, signature.
    const SIGNATURES: [(&str, usize, &[u8]); 12] = [
        ("qcow1", 0, b"QFI\xfb\0\0\0\x01"),
        ("qcow2", 0, b"QFI\xfb"),
        ("qed", 0, b"QED\0"),
        ("vmdk", 0, b"KDMV"),
        ("vmdk", 0, b"COWD"),
        ("vmdk", 0, b"# Disk DescriptorFile"),
        ("vhdx", 0, b"vhdxfile"),
        ("vhd", 0, b"conectix"),
        ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
        ("luks", 0, b"LUKS\xba\xbe"),
        ("parallels", 0, b"WithoutFreeSpace"),
        ("parallels", 0, b"WithouFreSpacExt"),
    ];
    let from_head = SIGNATURES.iter().find(|(_, at, signature)| {
        head.get(*at..)
            .is_some_and(|rest| rest.starts_with(signature))
    });
    if let Some((format, ..)) = from_head {
        return Some(format);
    }
    if tail.starts_with(b"conectix") {
        return Some("vhd");
    }
    tail.starts_with(b"koly").then_some("dmg")
}

/// What to do with an image of that format.
pub fn advice(format: &str) -> &'static str {
    match format {
        "luks" => "open it with cryptsetup, or say -f raw to export the encrypted bytes",
        _ => "convert it with qemu-img convert -O raw, or say -f raw if it really is raw",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, tool};
    use std::path::Path;

    fn probe_path(path: &Path) -> Option<&'static str> {
        let file = File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        probe(&file, length).unwrap()
    }

    #[test]
    fn formats_that_qemu_img_makes_are_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let formats = [
            ("qcow2", "", "qcow2"),
            ("qcow", "", "qcow1"),
            ("qed", "", "qed"),
            ("vmdk", "", "vmdk"),
            ("vmdk", "subformat=monolithicFlat", "vmdk"),
            ("vhdx", "", "vhdx"),
            ("vpc", "subformat=dynamic", "vhd"),
            ("vpc", "subformat=fixed", "vhd"),
            ("vdi", "", "vdi"),
            ("parallels", "", "parallels"),
        ];
        for (format, option, expected) in formats {
            let image = dir.path().join(format!("{format}{option}.img"));
            let mut args = vec!["create", "-q", "-f", format];
            if !option.is_empty() {
                args.extend(["-o", option]);
            }
            let path = image.to_str().unwrap();
            args.extend([path, "4M"]);
            let Some(output) = tool("qemu-img", &args) else {
                return;
            };
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr).into_owned();
                testing::skip(&format!("qemu-img cannot make {format}: {why}"));
                continue;
            }
            assert_eq!(probe_path(&image), Some(expected), "{format} {option}");
        }
    }

    #[test]
    fn luks_and_dmg_are_recognised() {
        assert_eq!(format_of(b"LUKS\xba\xbe\0\x02", b""), Some("luks"));
        assert_eq!(format_of(b"", b"koly\0\0\0\x04"), Some("dmg"));
    }

    #[test]
    fn raw_images_of_any_size_are_raw() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        for content in [&b""[..], b"x", b"QFI", &[0; 511], &[7; 100_000]] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(probe_path(&path), None);
        }
    }
}
