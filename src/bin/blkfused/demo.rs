//! The image that is exported when nothing was asked for.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

use blkfuse::AllowOther;
use log::{LevelFilter, warn};

use crate::cli::{Config, Pair, Serving};
use crate::failure::{Failure, Reason, Result};
use crate::image::{Options, Source};

/// What the image begins with.
const TEXT: &str = "This is the beginning of a disk image. You read it through blkfused.\n";
const LENGTH: u64 = 64 << 20;

/// A directory with an image and a mountpoint; removed when dropped.
#[derive(Debug)]
pub struct Demo {
    directory: PathBuf,
}

impl Demo {
    pub fn create() -> Result<Self> {
        let template = std::env::temp_dir().join("blkfused.XXXXXX");
        let directory = nix::unistd::mkdtemp(&template)
            .map_err(|errno| Failure::io(template.display(), &errno.into()))?;
        let demo = Self { directory };
        demo.fill()
            .map_err(|e| Failure::io(demo.directory.display(), &e))?;
        Ok(demo)
    }

    fn fill(&self) -> io::Result<()> {
        let mut image = File::create(self.image())?;
        image.set_len(LENGTH)?;
        image.write_all(TEXT.as_bytes())?;
        File::create(self.mountpoint()).map(drop)
    }

    fn image(&self) -> PathBuf {
        self.directory.join("disk.img")
    }

    fn mountpoint(&self) -> PathBuf {
        self.directory.join("disk")
    }

    /// Exports the image, writable.
    pub fn config(&self) -> Config {
        Config {
            exports: vec![Pair {
                image: Source::Path(self.image().into()),
                mountpoint: self.mountpoint().into(),
            }],
            options: Options {
                writable: true,
                growable: false,
                raw: true,
                cache: None,
                discard: true,
            },
            passthrough: false,
            allow_other: AllowOther::Auto,
            serving: Serving::default(),
            log_level: LevelFilter::Info,
        }
    }

    /// What to do with it.
    pub fn hints(&self) -> String {
        let mountpoint = self.mountpoint();
        let path = mountpoint.display();
        format!(
            "  Look at it with, for example:  head -n 1 {path}\n  \
               Make a file system in it with:  mkfs.ext4 {path}\n  \
               The directory {} is removed at the end.",
            self.directory.display()
        )
    }
}

impl Drop for Demo {
    /// Removes what was made and nothing else: whatever the user put there
    /// keeps the directory.
    fn drop(&mut self) {
        let removed = fs::remove_file(self.mountpoint())
            .and_then(|()| fs::remove_file(self.image()))
            .and_then(|()| fs::remove_dir(&self.directory));
        if let Err(e) = removed {
            warn!("{}: not removed: {}", self.directory.display(), Reason(&e));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demonstration_leaves_nothing_behind() {
        let demo = Demo::create().unwrap();
        let image = fs::read(demo.image()).unwrap();
        assert_eq!(image.len() as u64, LENGTH);
        assert!(image.starts_with(TEXT.as_bytes()));
        assert_eq!(fs::metadata(demo.mountpoint()).unwrap().len(), 0);
        let directory = demo.directory.clone();
        drop(demo);
        assert!(!directory.exists());
    }
}
