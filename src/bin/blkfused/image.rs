//! Opening what a command line names as an image.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use blkfuse::BlockDriver;
use log::{info, warn};
use nix::errno::Errno;

use crate::failure::{Failure, Result};
use crate::lock::{self, Access, Refusal};
use crate::null::Null;
use crate::plugin::{self, Plugin};
use crate::probe;
use crate::ram::Ram;
use crate::raw::Raw;
use crate::size;

/// How an image is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub writable: bool,
    pub growable: bool,
    /// The format was named; do not guess.
    pub raw: bool,
    /// `None`: whatever works best.
    pub cache: Option<Cache>,
    /// Whether space may be given back.
    pub discard: bool,
}

/// Whether an image's data goes through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Cache {
    /// O_DIRECT: the page cache is left alone
    None,
    /// Reads and writes go through the page cache
    Writeback,
}

/// An open image: one of the drivers.
#[derive(Debug)]
pub enum Image {
    Raw(Raw),
    Ram(Ram),
    Null(Null),
    Plugin(Plugin),
}

impl Image {
    pub fn length(&self) -> io::Result<u64> {
        match self {
            Self::Raw(raw) => raw.length(),
            Self::Ram(ram) => Ok(ram.length()),
            Self::Null(null) => Ok(null.length()),
            Self::Plugin(plugin) => plugin.driver().length(),
        }
    }

    /// Makes everything durable, when nobody serves requests.
    pub fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.flush_now(),
            // Nothing here outlives the process.
            Self::Ram(_) | Self::Null(_) => Ok(()),
            Self::Plugin(plugin) => plugin.flush_now(),
        }
    }
}

/// What a command line can name as an image.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// `null:SIZE`
    Null(u64),
    /// `ram:SIZE`
    Ram(u64),
    /// `plugin:FILE,KEY=VALUE`
    Plugin(plugin::Spec),
    /// Anything else; `./null:1` is the file of that name.
    Path(OsString),
}

impl Source {
    pub fn parse(name: OsString) -> Result<Self> {
        for (prefix, source) in MEMORY {
            if let Some(text) = name.as_bytes().strip_prefix(prefix.as_bytes()) {
                // What is not UTF-8 becomes something that is no size either.
                let size = size::parse(&String::from_utf8_lossy(text));
                return size
                    .map(source)
                    .map_err(|reason| Failure::new(name.display(), reason));
            }
        }
        if let Some(text) = name.as_bytes().strip_prefix(plugin::PREFIX.as_bytes()) {
            return plugin::Spec::parse(OsStr::from_bytes(text)).map(Self::Plugin);
        }
        Ok(Self::Path(name))
    }

    /// Opens it; if it is a file, locks it, too.
    pub fn open(&self, options: Options) -> Result<Image> {
        Ok(match self {
            Self::Null(length) => Image::Null(Null::new(*length)),
            Self::Ram(length) => Image::Ram(Ram::new(*length)),
            Self::Plugin(spec) => Image::Plugin(spec.open(options)?),
            Self::Path(path) => Image::Raw(open_raw(Path::new(path), options)?),
        })
    }

    /// The name that it has in messages and in the mount table.
    pub fn name(&self) -> &OsStr {
        match self {
            Self::Null(_) => "null".as_ref(),
            Self::Ram(_) => "ram".as_ref(),
            Self::Plugin(spec) => &spec.file,
            Self::Path(path) => path,
        }
    }
}

type Prefix = (&'static str, fn(u64) -> Source);

/// What begins the names of what is only memory.
const MEMORY: [Prefix; 2] = [("null:", Source::Null), ("ram:", Source::Ram)];

/// Whether `name` stands for something that can be opened.
pub fn exists(name: &OsStr) -> bool {
    let is = |prefix: &str| name.as_bytes().starts_with(prefix.as_bytes());
    MEMORY.iter().any(|(prefix, _)| is(prefix)) || is(plugin::PREFIX) || Path::new(name).exists()
}

/// All descriptors are opened here, once: the export may be mounted over the
/// image itself, and then the path leads to the export.
fn open_raw(path: &Path, options: Options) -> Result<Raw> {
    let fail = |e: &io::Error| Failure::io(path.display(), e);

    // Before opening, which may block (a FIFO) or do things (a tape).
    let metadata = std::fs::metadata(path).map_err(|e| fail(&e))?;
    check_type(path, &metadata, options)?;
    let mut flags = 0;
    if options.writable && metadata.file_type().is_block_device() {
        // Claims the device: nothing in the kernel uses it, nor will.
        flags = libc::O_EXCL;
    }
    let file = open_file(path, options, flags).map_err(|e| explain(path, options, &e))?;
    let metadata = file.metadata().map_err(|e| fail(&e))?;
    check_type(path, &metadata, options)?;

    lock_image(path, &file, options)?;
    if !options.raw {
        refuse_formats(path, &file)?;
    }
    let direct = open_direct(path, &metadata, options)?;
    let seek = open_again(path, &metadata, options, 0).map_err(|e| fail(&e))?;
    Ok(Raw::new(file, direct, seek, &metadata, options.discard))
}

/// Refuses what is neither a regular file nor a block device.
fn check_type(path: &Path, metadata: &Metadata, options: Options) -> Result<()> {
    let kind = metadata.file_type();
    if kind.is_block_device() && options.growable {
        return Err(Failure::new(path.display(), "a block device cannot grow")
            .advise("leave --growable out"));
    }
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let reason = if kind.is_dir() {
        "is a directory"
    } else {
        "is neither a regular file nor a block device"
    };
    Err(Failure::new(path.display(), reason).advise("name a disk image"))
}

fn open_file(path: &Path, options: Options, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(options.writable)
        // Never waits for whatever the path may have become meanwhile.
        .custom_flags(flags | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
}

/// Says what helps against an image that cannot be opened.
fn explain(path: &Path, options: Options, error: &io::Error) -> Failure {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) if options.writable => {
            Failure::io(path.display(), error)
                .advise("leave -w out to export it read-only, if it may be read")
        }
        Some(Errno::EBUSY) => Failure::new(path.display(), "the device is in use")
            .advise("unmount it first, or leave -w out"),
        Some(Errno::ETXTBSY) => Failure::new(path.display(), "it is in use as a program or swap")
            .advise("stop that use first, or leave -w out"),
        _ => Failure::io(path.display(), error),
    }
}

fn lock_image(path: &Path, file: &File, options: Options) -> Result<()> {
    let access = if options.writable {
        Access::Write
    } else {
        Access::Read
    };
    match lock::lock(file, access) {
        Ok(()) => Ok(()),
        Err(Refusal::Conflict(reason)) => {
            Err(Failure::new(path.display(), reason).advise("stop that one first"))
        }
        Err(Refusal::Impossible(errno)) => {
            warn!(
                "{}: its file system cannot lock it ({}); nothing keeps others from using it",
                path.display(),
                errno.desc()
            );
            Ok(())
        }
    }
}

fn refuse_formats(path: &Path, mut file: &File) -> Result<()> {
    let length = file.seek(SeekFrom::End(0));
    let format = length.and_then(|length| probe::probe(file, length));
    match format.map_err(|e| Failure::io(path.display(), &e))? {
        Some(format) => Err(
            Failure::new(path.display(), format_args!("looks like {format}"))
                .advise(probe::advice(format)),
        ),
        None => Ok(()),
    }
}

/// The descriptor around the page cache, unless there is to be none.
fn open_direct(path: &Path, metadata: &Metadata, options: Options) -> Result<Option<File>> {
    if options.cache == Some(Cache::Writeback) {
        return Ok(None);
    }
    let error = match open_again(path, metadata, options, libc::O_DIRECT) {
        Ok(file) => return Ok(Some(file)),
        Err(e) => e,
    };
    if error.raw_os_error() != Some(libc::EINVAL) {
        return Err(Failure::io(path.display(), &error));
    }
    let reason = "its file system does not support O_DIRECT";
    if options.cache == Some(Cache::None) {
        return Err(Failure::new(path.display(), reason).advise("use --cache writeback"));
    }
    info!("{}: {reason}; using the page cache", path.display());
    Ok(None)
}

/// Opens the image once more, and makes sure it is still the same.
fn open_again(path: &Path, metadata: &Metadata, options: Options, flags: i32) -> io::Result<File> {
    let file = open_file(path, options, flags)?;
    let again = file.metadata()?;
    if (again.dev(), again.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(io::Error::other(
            "somebody replaced it while it was being opened",
        ));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Options = Options {
        writable: false,
        growable: false,
        raw: false,
        cache: None,
        discard: true,
    };
    const WRITE: Options = Options {
        writable: true,
        ..READ
    };

    fn open(name: impl AsRef<OsStr>, options: Options) -> Result<Image> {
        Source::parse(name.as_ref().to_owned())?.open(options)
    }

    fn refusal(name: impl AsRef<OsStr>, options: Options) -> String {
        open(name, options).unwrap_err().to_string()
    }

    #[test]
    fn memory_devices_have_the_size_they_are_given() {
        let null = open("null:8G", READ).unwrap();
        assert!(matches!(null, Image::Null(null) if null.length() == 8 << 30));
        let ram = open("ram:1000001", READ).unwrap();
        assert!(matches!(ram, Image::Ram(ram) if ram.length() == 1_000_001));
        assert!(refusal("ram:64MB", READ).starts_with("ram:64MB: not a size; write"));
        assert!(refusal("null:9E", READ).starts_with("null:9E: too large;"));
        assert!(refusal(OsStr::from_bytes(b"null:1\xff"), READ).contains("not a size"));
        assert!(exists("ram:1".as_ref()) && !exists("./ram:1".as_ref()));
    }

    #[test]
    fn only_one_may_write_and_both_are_told_apart_by_the_message() {
        let dir = tempfile::tempdir().unwrap();
        // Not UTF-8, and with an equals sign.
        let path = dir.path().join(OsStr::from_bytes(b"a=\xff.img"));
        std::fs::write(&path, b"raw").unwrap();
        let first = open(&path, WRITE).unwrap();
        let second = refusal(&path, WRITE);
        assert!(
            second.ends_with(": another process has it open for writing; stop that one first"),
            "{second}"
        );
        assert!(refusal(&path, READ).contains("may resize it"));
        drop(first);
        let reader = open(&path, READ).unwrap();
        assert!(refusal(&path, WRITE).contains("lets nobody else resize it"));
        drop(reader);
        open(&path, WRITE).unwrap();
    }

    #[test]
    fn other_formats_need_to_be_called_raw() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
        assert!(refusal(&path, READ).ends_with(
            "disk.img: looks like qcow2; convert it with qemu-img convert -O raw, \
             or say -f raw if it really is raw"
        ));
        open(&path, Options { raw: true, ..READ }).unwrap();
    }

    #[test]
    fn what_is_no_image_is_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(dir.path(), READ).ends_with(": is a directory; name a disk image"));
        assert!(refusal("/dev/null", READ).contains("neither a regular file"));
        let missing = dir.path().join("missing");
        assert!(refusal(missing, WRITE).ends_with("missing: No such file or directory"));
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(refusal(fifo, READ).contains("neither a regular file"));
    }
}
