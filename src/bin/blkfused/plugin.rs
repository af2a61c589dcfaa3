//! Devices whose driver is a plugin: a shared library, as described in
//! `include/blkfuse-plugin.h`.

mod library;

use std::ffi::{CString, OsStr, OsString};
use std::fmt::Write;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use blkfuse::{BlockDriver, CDriver, Io};

use crate::failure::{Failure, Result};
use crate::image::Options;
use library::{Device, Library, Setting};

/// What begins the name of a device of a plugin.
pub const PREFIX: &str = "plugin:";

/// A plugin and what it is told.
#[derive(Debug, PartialEq, Eq)]
pub struct Spec {
    pub file: OsString,
    settings: Vec<Setting>,
}

impl Spec {
    /// A plugin's file, and words of the form KEY=VALUE.
    pub fn new(file: OsString, words: impl IntoIterator<Item = OsString>) -> Result<Self> {
        let settings = words.into_iter().map(setting).collect::<Result<_>>()?;
        Ok(Self { file, settings })
    }

    /// Reads `FILE,KEY=VALUE,KEY=VALUE`, where two commas stand for one that
    /// does not separate.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let mut words = split_at_commas(text.as_bytes()).into_iter();
        let file = words.next().unwrap_or_default();
        if file.is_empty() {
            return Err(
                Failure::new(format_args!("{PREFIX}{}", text.display()), "names no file")
                    .advise("write plugin:FILE,KEY=VALUE"),
            );
        }
        Self::new(OsString::from_vec(file), words.map(OsString::from_vec))
    }

    /// Loads the plugin and opens the device.
    pub fn open(&self, options: Options) -> Result<Plugin> {
        let library = Library::load(Path::new(&self.file))?;
        for (key, _) in &self.settings {
            if !library.keys().any(|known| *key == known.key) {
                return Err(unknown(&library, &key.to_string_lossy()));
            }
        }
        let device = library.open(&self.settings, options.writable)?;
        Ok(Plugin {
            device,
            discard: options.discard,
        })
    }
}

fn setting(word: OsString) -> Result<Setting> {
    let bytes = word.as_bytes();
    let equals = bytes.iter().position(|b| *b == b'=').filter(|at| *at > 0);
    let setting = equals.and_then(|at| {
        let key = CString::new(&bytes[..at]).ok()?;
        Some((key, CString::new(&bytes[at + 1..]).ok()?))
    });
    setting.ok_or_else(|| {
        Failure::new(word.display(), "does not set anything").advise("write KEY=VALUE")
    })
}

/// Cuts at single commas; of double ones one stays.
fn split_at_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut words = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            words.push(Vec::new());
        } else if let Some(word) = words.last_mut() {
            word.push(byte);
        }
    }
    words
}

/// A key that the plugin does not know.
fn unknown(library: &Library, key: &str) -> Failure {
    let reason = format!("unknown key \"{key}\"");
    let known: Vec<_> = library
        .keys()
        .map(|known| known.key.to_string_lossy())
        .collect();
    let advice = if known.is_empty() {
        "it has no keys".to_owned()
    } else {
        format!("it knows: {}", known.join(", "))
    };
    Failure::new(library.file().display(), reason).advise(&advice)
}

/// The help of the plugin in that file.
pub fn help(file: &OsStr) -> Result<String> {
    let library = Library::load(Path::new(file))?;
    let mut text = library.name().into_owned();
    // Writing to a string does not fail.
    if let Some(version) = library.version() {
        let _ = write!(text, " {version}");
    }
    if let Some(description) = library.description() {
        let _ = write!(text, ": {description}");
    }
    let file = file.display();
    let _ = write!(
        text,
        "\n\nUsage: blkfused [OPTIONS] --plugin {file} [KEY=VALUE]... MOUNTPOINT\n"
    );
    let keys: Vec<_> = library
        .keys()
        .map(|key| (key.key.to_string_lossy(), key.help))
        .collect();
    if !keys.is_empty() {
        text.push_str("\nKeys:\n");
    }
    let width = keys.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    for (key, help) in &keys {
        let help = help.map(|text| text.to_string_lossy()).unwrap_or_default();
        let mut lines = help.lines();
        let first = lines.next().unwrap_or_default();
        let line = format!("  {key:width$}  {first}");
        let _ = writeln!(text, "{}", line.trim_end());
        for line in lines {
            let _ = writeln!(text, "  {:width$}  {line}", "");
        }
    }
    if let Some(help) = library.help() {
        let _ = write!(text, "\n{}\n", help.trim_end());
    }
    text.push_str("\nThe OPTIONS are those of blkfused --help.\n");
    Ok(text)
}

/// A device that a plugin has opened.
#[derive(Debug)]
pub struct Plugin {
    device: Device,
    /// Whether space may be given back.
    discard: bool,
}

impl Plugin {
    pub fn driver(&self) -> &CDriver {
        self.device.driver()
    }

    /// Makes everything durable, for no request.
    pub fn flush_now(&self) -> io::Result<()> {
        self.device.sync()
    }

    pub async fn discard(&self, io: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        if !self.discard {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.driver().discard(io, offset, bytes).await
    }

    pub async fn write_zeroes(
        &self,
        io: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        let may_unmap = may_unmap && self.discard;
        self.driver()
            .write_zeroes(io, offset, bytes, may_unmap)
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        let words = split_at_commas(text.as_bytes()).into_iter();
        words.map(|word| String::from_utf8(word).unwrap()).collect()
    }

    #[test]
    fn double_commas_do_not_separate() {
        assert_eq!(words("a.so"), ["a.so"]);
        assert_eq!(words("a.so,k=v,l="), ["a.so", "k=v", "l="]);
        assert_eq!(words("a,,b.so,k=1,,2,,"), ["a,b.so", "k=1,2,"]);
        assert_eq!(words("a.so,,,k=v"), ["a.so,", "k=v"]);
    }

    #[test]
    fn a_device_is_a_file_and_settings() {
        let parse = |text: &str| Spec::parse(text.as_ref());
        let spec = parse("./a.so,size=1M,path=x=y,empty=").unwrap();
        assert_eq!(spec.file, "./a.so");
        let settings = [("size", "1M"), ("path", "x=y"), ("empty", "")];
        let settings = settings.map(|(key, value)| {
            let text = |text| CString::new(text).unwrap();
            (text(key), text(value))
        });
        assert_eq!(spec.settings, settings);
        let failure = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(
            failure(",size=1"),
            "plugin:,size=1: names no file; write plugin:FILE,KEY=VALUE"
        );
        for wrong in ["size", "=1", ""] {
            assert_eq!(
                failure(&format!("a.so,{wrong}")),
                format!("{wrong}: does not set anything; write KEY=VALUE")
            );
        }
    }
}
