//! The command line: what it means, and its help.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use blkfuse::{AllowOther, BlockDriver, Builder, IoUring};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, CommandFactory, Parser, ValueEnum};
use log::LevelFilter;

use crate::failure::{Failure, Result};
use crate::image::{self, Cache, Source};
use crate::plugin;
use crate::size;

/// Shows disk images as regular files, through FUSE.
///
/// blkfused mounts IMAGE over the existing regular file MOUNTPOINT, stays in
/// the foreground, and ends when it is told to (SIGTERM, SIGINT, SIGHUP) or
/// when everything it exports was unmounted. It first finishes what is under
/// way and has mapped memory written back; told once more, it does not. Without
/// any arguments it exports a small image made for the occasion, to look at.
#[derive(Debug, Parser)]
#[command(
    name = "blkfused",
    version,
    max_term_width = 100,
    override_usage = "blkfused [OPTIONS] IMAGE MOUNTPOINT\n       \
                      blkfused [OPTIONS] --plugin FILE [KEY=VALUE]... MOUNTPOINT\n       \
                      blkfused [OPTIONS] --export IMAGE=MOUNTPOINT...",
    after_help = "Exit status: 0 after a signal or after somebody else unmounted everything, \
                  1 after a failure, 2 if the command line is wrong."
)]
struct Arguments {
    /// Disk image to export: a regular file, a block device, `ram:SIZE` (memory) or `null:SIZE`
    /// (zeroes), where SIZE is like 64M, 8G or 1000001, or `plugin:FILE,KEY=VALUE...`, as with
    /// --plugin (two commas stand for one in a value)
    #[arg(
        value_name = "IMAGE",
        required_unless_present_any = ["exports", "plugin"]
    )]
    image: Option<OsString>,

    /// Existing regular file to mount the image over (which may be the image itself), or /dev/fd/N
    /// for an inherited descriptor of an already mounted /dev/fuse
    #[arg(
        value_name = "MOUNTPOINT",
        required_unless_present_any = ["exports", "plugin"]
    )]
    mountpoint: Option<OsString>,

    /// With --plugin there are any number of words
    #[arg(hide = true)]
    more: Vec<OsString>,

    /// Export what a driver in the shared library FILE offers, in the place of an IMAGE; with --help,
    /// say which KEYs it understands. The header blkfuse-plugin.h says how to write one
    #[arg(long, value_name = "FILE")]
    plugin: Option<OsString>,

    /// Export one more image; may be repeated, and if one fails to start then none stays. Of several
    /// equals signs the one that separates two existing paths counts, else the last
    #[arg(long = "export", value_name = "IMAGE=MOUNTPOINT")]
    exports: Vec<OsString>,

    /// Image format, which is not guessed: without this option an image that looks like anything
    /// but raw is refused
    #[arg(short, long, value_enum)]
    format: Option<Format>,

    /// Allow writing; without this option the export and the image are read-only
    #[arg(short, long)]
    writable: bool,

    /// Let writes past the end make the image longer; needs --writable. (Without it they fail, and
    /// only an explicit truncate or fallocate changes the length)
    #[arg(long)]
    growable: bool,

    /// Have the kernel itself read the image, at its full speed; only for read-only exports of
    /// regular files, by root. --cache and --threads then do not matter for reading, and programs
    /// that have the file open when blkfused ends can go on reading the image
    #[arg(long)]
    passthrough: bool,

    /// Let other users open the exported file; auto means if the system permits it
    #[arg(long, value_name = "WHETHER", value_enum, default_value = "auto")]
    allow_other: Whether,

    /// Number of threads that serve each export [default: chosen by the number of CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Whether requests come through FUSE-over-io_uring, which is faster than /dev/fuse; auto means
    /// if the system has it, without known defects
    #[arg(long, value_name = "WHETHER", value_enum, default_value = "auto")]
    io_uring: Whether,

    /// Number of requests of each CPU that can be in hand at once over io_uring, up to 1024
    /// [default: at most 64, as --memory-budget allows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    queue_depth: Option<u16>,

    /// Largest read and write at once, a multiple of 4K from 64K to 1M [default: 1M, or over io_uring
    /// what --memory-budget allows]
    #[arg(long, value_name = "SIZE", value_parser = request_size)]
    max_request: Option<u32>,

    /// How much memory io_uring's buffers may take for each export: CPUs (all that the kernel could
    /// have) × queue depth × (4K + largest request). To fit, the depth is lowered before the size
    /// [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory_budget: Option<u64>,

    /// Whether the image's data goes through the page cache [default: none where the image's file
    /// system supports it, otherwise writeback]
    #[arg(long, value_name = "MODE", value_enum)]
    cache: Option<Cache>,

    /// Whether holes that are punched into the exported file free space in the image
    #[arg(long, value_name = "WHETHER", value_enum, default_value = "on")]
    discard: OnOff,

    /// How much to log to standard error
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        value_parser = PossibleValuesParser::new(["off", "error", "warn", "info", "debug", "trace"])
            .try_map(|level| level.parse::<LevelFilter>())
    )]
    log_level: LevelFilter,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// The image's bytes are the disk's bytes
    Raw,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Whether {
    On,
    Off,
    Auto,
}

/// Reads --max-request. The error is a reason that fits behind the text.
fn request_size(text: &str) -> std::result::Result<u32, String> {
    let bytes = size::parse(text)?;
    match u32::try_from(bytes) {
        Ok(size) if (64 << 10..=1 << 20).contains(&size) && size.is_multiple_of(4096) => Ok(size),
        _ => Err("not a multiple of 4K from 64K to 1M".into()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

/// What is to be exported, and how.
#[derive(Debug)]
pub struct Config {
    pub exports: Vec<Pair>,
    pub options: image::Options,
    pub passthrough: bool,
    pub allow_other: AllowOther,
    pub serving: Serving,
    pub log_level: LevelFilter,
}

/// How requests are served; the default is what seems right.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// 0: as many as seem right.
    threads: usize,
    io_uring: IoUring,
    queue_depth: Option<usize>,
    /// In bytes.
    max_request: Option<u32>,
    /// In bytes.
    memory_budget: Option<u64>,
}

impl Serving {
    /// Has it served like this.
    pub fn configure<D: BlockDriver>(&self, builder: Builder<D>) -> Builder<D> {
        let mut builder = builder.queues(self.threads).io_uring(self.io_uring);
        if let Some(depth) = self.queue_depth {
            builder = builder.queue_depth(depth);
        }
        if let Some(bytes) = self.max_request {
            builder = builder.max_request(bytes);
        }
        if let Some(bytes) = self.memory_budget {
            builder = builder.memory_budget(bytes);
        }
        builder
    }
}

/// An image and where to show it.
#[derive(Debug, PartialEq, Eq)]
pub struct Pair {
    pub image: Source,
    pub mountpoint: OsString,
}

/// What the user wants.
#[derive(Debug)]
pub enum Wish {
    Export(Config),
    /// The help of the plugin in that file.
    PluginHelp(OsString),
}

/// Reads the program's command line. Help, and mistakes that need no words of
/// our own, end the program right here.
pub fn parse() -> Result<Wish> {
    match Arguments::try_parse() {
        Ok(arguments) => arguments.into_config().map(Wish::Export),
        Err(error) => match plugin_of(std::env::args_os()) {
            Some(file) if error.kind() == ErrorKind::DisplayHelp => Ok(Wish::PluginHelp(file)),
            _ => error.exit(),
        },
    }
}

/// The plugin on a command line that asks for help, and need not be complete.
fn plugin_of(words: impl IntoIterator<Item = OsString>) -> Option<OsString> {
    let help = Arg::new("help").short('h').long("help");
    Arguments::command()
        .disable_help_flag(true)
        .arg(help.action(ArgAction::SetTrue))
        .ignore_errors(true)
        .try_get_matches_from(words)
        .ok()?
        .remove_one("plugin")
}

/// What the program's command line can be.
#[cfg(test)]
pub fn command() -> clap::Command {
    <Arguments as clap::CommandFactory>::command()
}

impl Arguments {
    /// Takes the words that are no options: what to export, and where.
    fn take_words(&mut self) -> Result<Option<Pair>> {
        let first = [self.image.take(), self.mountpoint.take()];
        let mut words: Vec<_> = first.into_iter().flatten().collect();
        words.append(&mut self.more);
        let plugin = self.plugin.take();
        let Some(mountpoint) = words.pop() else {
            return plugin.map_or(Ok(None), |file| Err(nowhere(&file)));
        };
        let image = match (plugin, words.pop()) {
            (Some(file), last) => {
                Source::Plugin(plugin::Spec::new(file, words.into_iter().chain(last))?)
            }
            (None, None) => return Err(nowhere(&mountpoint)),
            (None, Some(image)) if words.is_empty() => Source::parse(image)?,
            (None, Some(_)) => {
                let reason = "is neither the image nor its mountpoint";
                return Err(Failure::new(mountpoint.display(), reason)
                    .advise("export more images by --export"));
            }
        };
        Ok(Some(Pair { image, mountpoint }))
    }

    fn into_config(mut self) -> Result<Config> {
        if self.growable && !self.writable {
            return Err(Failure::new("--growable", "a read-only export cannot grow")
                .advise("add --writable"));
        }
        if self.passthrough && self.writable {
            let reason = "only a read-only export can have it";
            return Err(Failure::new("--passthrough", reason).advise("leave -w out, or it"));
        }
        let mut exports = Vec::from_iter(self.take_words()?);
        for text in &self.exports {
            let (image, mountpoint) = split(text, image::exists, |path| Path::new(path).exists())?;
            let image = Source::parse(image)?;
            exports.push(Pair { image, mountpoint });
        }
        Ok(Config {
            exports,
            options: image::Options {
                writable: self.writable,
                growable: self.growable,
                raw: self.format.is_some(),
                cache: self.cache,
                discard: self.discard == OnOff::On,
            },
            passthrough: self.passthrough,
            allow_other: match self.allow_other {
                Whether::On => AllowOther::On,
                Whether::Off => AllowOther::Off,
                Whether::Auto => AllowOther::Auto,
            },
            serving: Serving {
                threads: self.threads.unwrap_or(0).into(),
                io_uring: match self.io_uring {
                    Whether::On => IoUring::On,
                    Whether::Off => IoUring::Off,
                    Whether::Auto => IoUring::Auto,
                },
                queue_depth: self.queue_depth.map(usize::from),
                max_request: self.max_request,
                memory_budget: self.memory_budget,
            },
            log_level: self.log_level,
        })
    }
}

/// There is no mountpoint for `what`.
fn nowhere(what: &OsStr) -> Failure {
    Failure::new(what.display(), "is to be exported, but not where")
        .advise("name a mountpoint, too")
}

/// Splits IMAGE=MOUNTPOINT. Paths may contain equals signs themselves, so of
/// several the one that has something existing on both sides is taken. If
/// there is none, the last one is: what is missing is reported later.
fn split(
    text: &OsStr,
    is_image: impl Fn(&OsStr) -> bool,
    is_mountpoint: impl Fn(&OsStr) -> bool,
) -> Result<(OsString, OsString)> {
    let bytes = text.as_bytes();
    let places: Vec<usize> = (1..bytes.len().saturating_sub(1))
        .filter(|at| bytes[*at] == b'=')
        .collect();
    let part = |range: &[u8]| OsString::from_vec(range.to_vec());
    let pair = |at: usize| (part(&bytes[..at]), part(&bytes[at + 1..]));
    let mut fitting = places
        .iter()
        .map(|at| pair(*at))
        .filter(|(image, mountpoint)| {
            places.len() > 1 && is_image(image) && is_mountpoint(mountpoint)
        });
    match (fitting.next(), fitting.next(), places.last()) {
        (Some(pair), None, _) => Ok(pair),
        (None, _, Some(at)) => Ok(pair(*at)),
        (Some(_), Some(_), _) => Err(Failure::new(
            text.display(),
            "more than one of its equals signs separates an image from a mountpoint",
        )
        .advise("use other paths to them, for example symbolic links")),
        (None, _, None) => Err(Failure::new(
            text.display(),
            "does not name an image and a mountpoint",
        )
        .advise("write --export IMAGE=MOUNTPOINT")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(arguments: &[&str]) -> Config {
        let all = [&["blkfused"], arguments].concat();
        Arguments::try_parse_from(all)
            .unwrap()
            .into_config()
            .unwrap()
    }

    fn pair(image: &str, mountpoint: &str) -> Pair {
        Pair {
            image: Source::Path(image.into()),
            mountpoint: mountpoint.into(),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_safe() {
        let config = config(&["disk.img", "/mnt/disk"]);
        assert_eq!(config.exports, [pair("disk.img", "/mnt/disk")]);
        assert!(!config.options.writable && !config.options.growable && !config.options.raw);
        assert!(config.options.discard && config.options.cache.is_none());
        assert!(!config.passthrough);
        assert_eq!(config.allow_other, AllowOther::Auto);
        assert_eq!(config.serving, Serving::default());
        assert_eq!(config.serving.io_uring, IoUring::Auto);
        assert_eq!(config.log_level, LevelFilter::Info);
    }

    #[test]
    fn all_options_are_understood() {
        let config = config(&[
            "-f",
            "raw",
            "-w",
            "--growable",
            "--allow-other",
            "off",
            "--threads",
            "3",
            "--io-uring",
            "on",
            "--queue-depth",
            "1024",
            "--max-request",
            "68K",
            "--memory-budget",
            "1G",
            "--cache",
            "none",
            "--discard",
            "off",
            "--log-level",
            "debug",
            "--export",
            "a=b",
            "c",
            "d",
            "--export",
            "e=f",
        ]);
        assert_eq!(
            config.exports,
            [pair("c", "d"), pair("a", "b"), pair("e", "f")]
        );
        assert!(config.options.writable && config.options.growable && config.options.raw);
        assert!(!config.options.discard);
        assert_eq!(config.options.cache, Some(Cache::None));
        assert_eq!(config.allow_other, AllowOther::Off);
        let serving = Serving {
            threads: 3,
            io_uring: IoUring::On,
            queue_depth: Some(1024),
            max_request: Some(69_632),
            memory_budget: Some(1 << 30),
        };
        assert_eq!(config.serving, serving);
        assert_eq!(config.log_level, LevelFilter::Debug);
        assert!(self::config(&["--passthrough", "a", "b"]).passthrough);
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for wrong in [
            &["disk.img"][..],
            &["-w"],
            &["-f", "qcow2", "a", "b"],
            &["--threads", "0", "a", "b"],
            &["--io-uring", "perhaps", "a", "b"],
            &["--queue-depth", "0", "a", "b"],
            &["--queue-depth", "1025", "a", "b"],
            &["--max-request", "60K", "a", "b"],
            &["--max-request", "65537", "a", "b"],
            &["--max-request", "2M", "a", "b"],
            &["--memory-budget", "much", "a", "b"],
            &["--log-level", "loud", "a", "b"],
        ] {
            let all = [&["blkfused"], wrong].concat();
            let error = Arguments::try_parse_from(all).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong:?}");
        }
        let growable = Arguments::parse_from(["blkfused", "--growable", "a", "b"]);
        assert_eq!(
            growable.into_config().unwrap_err().to_string(),
            "--growable: a read-only export cannot grow; add --writable"
        );
        let passthrough = Arguments::parse_from(["blkfused", "--passthrough", "-w", "a", "b"]);
        assert_eq!(
            passthrough.into_config().unwrap_err().to_string(),
            "--passthrough: only a read-only export can have it; leave -w out, or it"
        );
        let size = Arguments::parse_from(["blkfused", "ram:1X", "b"]);
        assert!(size.into_config().is_err());
        for (words, reason) in [
            (
                &["a", "b", "c"][..],
                "c: is neither the image nor its mountpoint;",
            ),
            (
                &["--export", "a=b", "c"],
                "c: is to be exported, but not where;",
            ),
            (
                &["--plugin", "c.so"],
                "c.so: is to be exported, but not where;",
            ),
            (&["--plugin", "c.so", "k", "b"], "k: does not set anything;"),
        ] {
            let arguments = Arguments::parse_from([&["blkfused"], words].concat());
            let failure = arguments.into_config().unwrap_err().to_string();
            assert!(failure.starts_with(reason), "{failure}");
        }
    }

    #[test]
    fn a_plugin_is_an_image_in_other_words() {
        let spec = |text: &str| Source::parse(text.into()).unwrap();
        let pair = |text, mountpoint: &str| Pair {
            image: spec(text),
            mountpoint: mountpoint.into(),
        };
        for (words, expected) in [
            (&["--plugin", "a.so", "m"][..], pair("plugin:a.so", "m")),
            (
                &["--plugin", "a.so", "k=v", "m"],
                pair("plugin:a.so,k=v", "m"),
            ),
            (
                &["k=v", "l=1,2", "--plugin", "a,b.so", "n=", "m"],
                pair("plugin:a,,b.so,k=v,l=1,,2,n=", "m"),
            ),
        ] {
            assert_eq!(config(words).exports, [expected]);
        }
        assert_eq!(
            config(&["--plugin", "a.so", "m", "--export", "plugin:b.so,k=v=n"]).exports,
            [pair("plugin:a.so", "m"), pair("plugin:b.so,k=v", "n")]
        );
    }

    #[test]
    fn help_for_a_plugin_is_found_on_any_command_line() {
        let plugin_of = |words: &[&str]| {
            let words = [&["blkfused"], words].concat();
            plugin_of(words.into_iter().map(OsString::from))
        };
        for words in [
            &["--plugin", "a.so", "--help"][..],
            &["-h", "--plugin=a.so"],
            &["-w", "--threads", "3", "--plugin", "a.so", "k=v", "--help"],
        ] {
            assert_eq!(plugin_of(words), Some("a.so".into()), "{words:?}");
        }
        assert_eq!(plugin_of(&["--help"]), None);
        assert_eq!(plugin_of(&["--help", "--plugin"]), None);
    }

    #[test]
    fn an_export_is_split_where_both_sides_exist() {
        let paths = |image: &str, mountpoint: &str| (image.into(), mountpoint.into());
        let split = |text: &str, existing: &[&str]| {
            let exists = |path: &OsStr| existing.iter().any(|other| *other == path);
            split(text.as_ref(), exists, exists)
        };
        assert_eq!(split("a=b", &[]).unwrap(), paths("a", "b"));
        assert_eq!(split("a=1=b", &[]).unwrap(), paths("a=1", "b"));
        assert_eq!(split("a=b=1", &["a", "b=1"]).unwrap(), paths("a", "b=1"));
        assert_eq!(split("a=b=1", &["a=b", "1"]).unwrap(), paths("a=b", "1"));
        assert_eq!(split("a==b", &["a=", "b"]).unwrap(), paths("a=", "b"));
        let ambiguous = split("a=b=c", &["a", "b=c", "a=b", "c"]).unwrap_err();
        assert!(ambiguous.to_string().contains("more than one"));
        for wrong in ["", "=", "a", "a=", "=b"] {
            let failure = split(wrong, &[]).unwrap_err().to_string();
            assert!(failure.contains("does not name an image"), "{wrong}");
        }
    }

    #[test]
    fn paths_need_not_be_utf8() {
        let text = OsStr::from_bytes(b"a\xff=b\xfe");
        let (image, mountpoint) = split(text, |_| false, |_| false).unwrap();
        assert_eq!(image.as_bytes(), b"a\xff");
        assert_eq!(mountpoint.as_bytes(), b"b\xfe");
    }
}
