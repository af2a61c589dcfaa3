//! Which mounts there are, from `/proc/thread-self/mountinfo`.
//!
//! "thread-self" and not "self", which is unusable in a process whose main
//! thread has ended.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::kernel;

/// Tells one mount from every other.
///
/// The kernel reuses ids and device numbers as soon as they are free, so that
/// the next mount often gets both; the unique id (Linux 6.8) it never reuses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct MountId {
    pub(super) id: u64,
    pub(super) unique: Option<u64>,
    pub(super) device: Option<String>,
}

impl MountId {
    /// The mount that an open file is on. Asks no file system.
    pub(super) fn of_file(file: BorrowedFd<'_>) -> Option<Self> {
        Some(Self {
            id: fdinfo(file, "mnt_id:")?,
            unique: kernel::unique_mount_id(file),
            device: None,
        })
    }

    /// Adds the device number, now that the mount is in the table.
    pub(super) fn with_device(mut self) -> Self {
        if let Ok(table) = MountTable::read_until(|table| table.find(&self).is_some()) {
            self.device = table.find(&self).map(|entry| entry.device.clone());
        }
        self
    }

    pub(super) fn same_mount(&self, other: &Self) -> bool {
        match (self.unique, other.unique) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.id == other.id,
        }
    }

    /// Whether an open file is on this mount, as far as the kernel tells. Makes
    /// only system calls, and asks no file system.
    pub(super) fn admits(&self, file: BorrowedFd<'_>) -> bool {
        let (found, ours) = match self.unique {
            Some(unique) => (kernel::unique_mount_id(file), unique),
            None => (kernel::mount_id(file), self.id),
        };
        found.is_none_or(|found| found == ours)
    }

    /// Whether the kernel says that no such mount is left. `false` is no answer.
    pub(super) fn is_known_to_be_gone(&self) -> bool {
        self.unique.is_some_and(kernel::is_unmounted)
    }

    fn matches(&self, entry: &MountEntry) -> bool {
        let same_device = self.device.as_ref().is_none_or(|d| *d == entry.device);
        self.id == entry.id && same_device && entry.is_fuse()
    }
}

/// The FUSE mount that a connection has been mounted as at `path`, just now.
pub(super) fn find_fuse_mount(device: BorrowedFd<'_>, path: &Path) -> Option<MountId> {
    let connection = connection_device(device);
    let table = MountTable::read().ok()?;
    let entry = match &connection {
        Some(number) => table.0.iter().find(|entry| entry.device == *number),
        None => table.topmost(path).filter(|entry| entry.is_fuse()),
    }?;
    Some(MountId {
        id: entry.id,
        unique: kernel::find_unique_mount_id(entry.id),
        device: Some(entry.device.clone()),
    })
}

/// The device number of a connection's file system, as mount tables show it.
fn connection_device(device: BorrowedFd<'_>) -> Option<String> {
    Some(format!("0:{}", connection_number(device)?))
}

/// The number of the connection that a /dev/fuse descriptor belongs to.
pub(super) fn connection_number(device: BorrowedFd<'_>) -> Option<u32> {
    fdinfo(device, "fuse_connection:")
}

/// A number that the kernel tells about an open file.
fn fdinfo<T: std::str::FromStr>(file: BorrowedFd<'_>, key: &str) -> Option<T> {
    let path = format!("/proc/thread-self/fdinfo/{}", file.as_raw_fd());
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().parse().ok()
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountEntry {
    pub(super) id: u64,
    pub(super) parent: u64,
    pub(super) device: String,
    pub(super) mount_point: PathBuf,
    pub(super) fs_type: String,
    pub(super) source: OsString,
}

impl MountEntry {
    /// Reads `id parent major:minor root mountpoint options [tag...] - type
    /// source superoptions`.
    fn parse(line: &[u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
        Some(Self {
            id: number(fields[0])?,
            parent: number(fields[1])?,
            device: String::from_utf8(fields[2].to_vec()).ok()?,
            mount_point: OsString::from_vec(unescape(fields[4])).into(),
            fs_type: String::from_utf8(fields.get(dash + 1)?.to_vec()).ok()?,
            source: OsString::from_vec(unescape(fields.get(dash + 2)?)),
        })
    }

    pub(super) fn is_fuse(&self) -> bool {
        matches!(self.fs_type.as_str(), "fuse" | "fuseblk") || self.fs_type.starts_with("fuse.")
    }
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Undoes the kernel's `\ooo` for blanks, newlines and backslashes.
fn unescape(mut field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    while let Some((&byte, rest)) = field.split_first() {
        match rest {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', rest @ ..] if byte == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                field = rest;
            }
            _ => {
                plain.push(byte);
                field = rest;
            }
        }
    }
    plain
}

/// The mounts of the calling thread's namespace.
#[derive(Debug)]
pub(super) struct MountTable(Vec<MountEntry>);

impl MountTable {
    pub(super) fn read() -> io::Result<Self> {
        fs::read("/proc/thread-self/mountinfo").map(|text| Self::parse(&text))
    }

    /// Reads it again if `complete` denies the first: before Linux 5.8 an entry
    /// can be missing when others change meanwhile.
    pub(super) fn read_until(complete: impl Fn(&Self) -> bool) -> io::Result<Self> {
        let table = Self::read()?;
        if complete(&table) {
            return Ok(table);
        }
        Self::read()
    }

    fn parse(text: &[u8]) -> Self {
        let lines = text.split(|&byte| byte == b'\n');
        Self(lines.filter_map(MountEntry::parse).collect())
    }

    pub(super) fn find(&self, id: &MountId) -> Option<&MountEntry> {
        self.0.iter().find(|entry| id.matches(entry))
    }

    /// The mount that a look-up of `path` ends in, if one is mounted right there.
    pub(super) fn topmost(&self, path: &Path) -> Option<&MountEntry> {
        self.find_visible(|entry| entry.mount_point == path)
    }

    /// The first mount wanted that nothing hides.
    pub(super) fn find_visible(&self, wanted: impl Fn(&MountEntry) -> bool) -> Option<&MountEntry> {
        self.0
            .iter()
            .find(|entry| wanted(entry) && self.hiding(entry).is_none())
    }

    /// The mount that keeps a look-up of `entry`'s path from ending in `entry`:
    /// one on top of it, or one on top of a directory above.
    pub(super) fn hiding(&self, entry: &MountEntry) -> Option<&MountEntry> {
        let on_top = |m: &&MountEntry| m.parent == entry.id && m.mount_point == entry.mount_point;
        if let Some(cover) = self.0.iter().find(on_top) {
            return Some(cover);
        }
        let mut below = entry;
        while let Some(parent) = self.parent(below) {
            let hides = |m: &&MountEntry| {
                m.parent == parent.id
                    && m.id != parent.id
                    && m.id != below.id
                    && below.mount_point.starts_with(&m.mount_point)
            };
            if let Some(cover) = self.0.iter().find(hides) {
                return Some(cover);
            }
            below = parent;
        }
        None
    }

    fn parent(&self, entry: &MountEntry) -> Option<&MountEntry> {
        // The first mount of a system is its own parent.
        self.0
            .iter()
            .find(|parent| parent.id == entry.parent && parent.id != entry.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    fn path(bytes: &[u8]) -> &Path {
        Path::new(OsStr::from_bytes(bytes))
    }

    fn table(lines: &[&str]) -> MountTable {
        MountTable::parse(lines.join("\n").as_bytes())
    }

    fn hiding_id(table: &MountTable, id: u64) -> Option<u64> {
        let entry = table.0.iter().find(|entry| entry.id == id).unwrap();
        table.hiding(entry).map(|cover| cover.id)
    }

    #[test]
    fn a_line_is_parsed_with_and_without_tags() {
        let tagged = b"36 35 0:98 / /mnt/a rw,noatime master:1 shared:7 - fuse.blkfuse /dev/x rw";
        let entry = MountEntry::parse(tagged).unwrap();
        assert_eq!((entry.id, entry.parent), (36, 35));
        assert_eq!(entry.device, "0:98");
        assert_eq!(entry.mount_point, Path::new("/mnt/a"));
        assert_eq!(entry.fs_type, "fuse.blkfuse");
        assert_eq!(entry.source, "/dev/x");
        assert!(entry.is_fuse());

        let bare = b"1 0 8:1 / / rw - ext4  rw";
        let entry = MountEntry::parse(bare).unwrap();
        assert_eq!(entry.source, "");
        assert!(!entry.is_fuse());
    }

    #[test]
    fn nonsense_is_no_entry() {
        for line in [
            "",
            " ",
            "36",
            "36 35 0:98 / /mnt rw",
            "36 35 0:98 / /mnt rw -",
            "36 35 0:98 / /mnt rw - fuse",
            "x 35 0:98 / /mnt rw - fuse s rw",
            "36 -1 0:98 / /mnt rw - fuse s rw",
        ] {
            assert_eq!(MountEntry::parse(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn fusectl_is_not_fuse() {
        for (fs_type, is_fuse) in [
            ("fuse", true),
            ("fuse.sshfs", true),
            ("fuseblk", true),
            ("fusectl", false),
            ("ext4", false),
        ] {
            let line = format!("36 35 0:98 / /mnt rw - {fs_type} s rw");
            assert_eq!(
                MountEntry::parse(line.as_bytes()).unwrap().is_fuse(),
                is_fuse
            );
        }
    }

    #[test]
    fn names_are_unescaped() {
        assert_eq!(unescape(br"/a\040b\011c\012d\134e"), b"/a b\tc\nd\\e");
        assert_eq!(unescape(br"\134040"), br"\040");
        assert_eq!(unescape(b"\xff\\377"), b"\xff\xff");
        assert_eq!(unescape(br"\9\04\"), br"\9\04\");
        assert_eq!(unescape(br"\777"), br"\777");
        let entry = MountEntry::parse(b"2 1 0:2 / /\xfe\\040x rw - fuse \\011 rw").unwrap();
        assert_eq!(entry.mount_point, path(b"/\xfe x"));
        assert_eq!(entry.source, "\t");
    }

    #[test]
    fn the_topmost_mount_is_found_by_parentage_not_by_order() {
        let table = table(&[
            "1 1 0:1 / / rw - rootfs r rw",
            "4 3 0:4 / /f rw - tmpfs stranger rw",
            "3 2 0:3 / /f rw - fuse ours rw",
            "2 1 8:1 / / rw - ext4 root rw",
        ]);
        assert_eq!(table.topmost(Path::new("/f")).unwrap().id, 4);
        assert_eq!(table.topmost(Path::new("/")).unwrap().id, 2);
        assert_eq!(table.topmost(Path::new("/g")), None);
        assert_eq!(hiding_id(&table, 3), Some(4));
        assert_eq!(hiding_id(&table, 4), None);
    }

    #[test]
    fn a_mount_above_hides_what_is_below_it() {
        let table = table(&[
            "2 1 8:1 / / rw - ext4 root rw",
            "3 2 0:3 / /d/f rw - fuse ours rw",
            "4 2 0:4 / /d rw - tmpfs hides rw",
            "5 4 0:5 / /d/f rw - fuse stranger rw",
            "6 2 0:6 / /d2 rw - tmpfs t rw",
            "7 2 0:7 / /d3/f rw - fuse other rw",
        ]);
        assert_eq!(hiding_id(&table, 3), Some(4));
        assert_eq!(table.topmost(Path::new("/d/f")).unwrap().id, 5);
        assert_eq!(hiding_id(&table, 7), None);
        assert_eq!(hiding_id(&table, 6), None);
    }

    #[test]
    fn a_mount_is_found_only_with_its_device() {
        let table = table(&[
            "3 2 0:3 / /f rw - fuse ours rw",
            "4 2 8:1 / /g rw - ext4 x rw",
        ]);
        let id = |id, device: Option<&str>| MountId {
            id,
            unique: None,
            device: device.map(str::to_owned),
        };
        assert!(table.find(&id(3, Some("0:3"))).is_some());
        assert!(table.find(&id(3, None)).is_some());
        assert!(table.find(&id(3, Some("0:4"))).is_none());
        assert!(table.find(&id(4, None)).is_none());
    }

    #[test]
    fn the_real_table_is_readable() {
        let table = MountTable::read().unwrap();
        assert!(table.topmost(Path::new("/")).is_some());
    }
}
