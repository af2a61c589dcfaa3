//! A sparse device of any length up to 2^63 − 1, whose real extents are known,
//! and an export of any driver under a watchdog.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use blkfuse::{BlockDriver, Builder, Export, Extent, Features, Io, ReadBuf};
use tempfile::TempDir;

use super::{SOON, Watchdog};

/// An exported driver of any kind, under a watchdog.
pub struct Exported {
    pub export: Option<Export>,
    pub path: PathBuf,
    _watchdog: Watchdog,
    _dir: TempDir,
}

impl Exported {
    /// Exports `driver` writable, with what `configure` changes of that.
    pub fn with<D: BlockDriver>(
        driver: D,
        queues: usize,
        configure: impl FnOnce(Builder<D>) -> Builder<D>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("disk");
        File::create(&path).unwrap();
        let watchdog = Watchdog::new(&path);
        let builder = Export::builder(driver)
            .mountpoint(&path)
            .writable(true)
            .queues(queues);
        let export = configure(builder).start().unwrap();
        Self {
            export: Some(export),
            path,
            _watchdog: watchdog,
            _dir: dir,
        }
    }

    pub fn open(&self) -> File {
        let options = File::options().read(true).write(true).clone();
        options.open(&self.path).unwrap()
    }
}

impl Drop for Exported {
    fn drop(&mut self) {
        if let Some(export) = self.export.take() {
            let deleted = export.delete(Some(SOON));
            assert!(
                deleted.is_ok() || std::thread::panicking(),
                "delete failed: {deleted:?}"
            );
        }
    }
}

/// The unit in which a `Sparse` keeps data.
pub const BLOCK: u64 = 4096;

/// A handle to a sparse device: blocks that were written, and a length.
#[derive(Clone)]
pub struct Sparse(Arc<Mutex<State>>);

struct State {
    length: u64,
    blocks: BTreeMap<u64, Box<[u8]>>,
    truncates: Vec<u64>,
}

impl Sparse {
    pub fn new(length: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            length,
            blocks: BTreeMap::new(),
            truncates: Vec::new(),
        })))
    }

    pub fn length(&self) -> u64 {
        self.0.lock().unwrap().length
    }

    /// All lengths that were set, in order.
    pub fn truncates(&self) -> Vec<u64> {
        self.0.lock().unwrap().truncates.clone()
    }

    /// Whether a block is allocated.
    pub fn has_block(&self, index: u64) -> bool {
        self.0.lock().unwrap().blocks.contains_key(&index)
    }

    /// Allocates a block of `byte`s.
    pub fn put_block(&self, index: u64, byte: u8) {
        let block = vec![byte; BLOCK as usize].into_boxed_slice();
        self.0.lock().unwrap().blocks.insert(index, block);
    }
}

/// Calls `each(block, offset in it, offset in the request, length)`.
fn for_blocks(offset: u64, len: u64, mut each: impl FnMut(u64, usize, usize, usize)) {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let within = at % BLOCK;
        let part = (BLOCK - within).min(len - done);
        each(at / BLOCK, within as usize, done as usize, part as usize);
        done += part;
    }
}

impl State {
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if len > self.length || offset > self.length - len {
            // The engine must never ask for this.
            return Err(io::Error::from_raw_os_error(libc::EDOM));
        }
        Ok(())
    }

    /// Forgets `offset..`, up to `end`.
    fn clear(&mut self, offset: u64, end: u64) {
        let keys = self.blocks.range(offset / BLOCK..end.div_ceil(BLOCK));
        for key in keys.map(|(k, _)| *k).collect::<Vec<_>>() {
            let from = offset.saturating_sub(key * BLOCK).min(BLOCK) as usize;
            let to = (end - key * BLOCK).min(BLOCK) as usize;
            if (from, to) == (0, BLOCK as usize) {
                self.blocks.remove(&key);
            } else if let Some(block) = self.blocks.get_mut(&key) {
                block[from..to].fill(0);
            }
        }
    }
}

impl BlockDriver for Sparse {
    fn length(&self) -> io::Result<u64> {
        Ok(self.length())
    }

    fn allocated_size(&self) -> io::Result<Option<u64>> {
        Ok(Some(self.0.lock().unwrap().blocks.len() as u64 * BLOCK))
    }

    fn features(&self) -> Features {
        Features {
            write: true,
            truncate: true,
        }
    }

    async fn read(&self, _: &Io<'_>, buf: &mut ReadBuf<'_>, offset: u64) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        state.check(offset, buf.len() as u64)?;
        buf.zero();
        let to = buf.bytes_mut();
        for_blocks(offset, to.len() as u64, |key, within, at, len| {
            if let Some(block) = state.blocks.get(&key) {
                to[at..at + len].copy_from_slice(&block[within..within + len]);
            }
        });
        Ok(())
    }

    async fn write(&self, _: &Io<'_>, data: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.check(offset, data.len() as u64)?;
        for_blocks(offset, data.len() as u64, |key, within, at, len| {
            let block = state.blocks.entry(key);
            let block = block.or_insert_with(|| vec![0; BLOCK as usize].into_boxed_slice());
            block[within..within + len].copy_from_slice(&data[at..at + len]);
        });
        Ok(())
    }

    async fn write_zeroes(
        &self,
        _: &Io<'_>,
        offset: u64,
        bytes: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.check(offset, bytes)?;
        state.clear(offset, offset + bytes);
        if !may_unmap {
            for_blocks(offset, bytes, |key, _, _, _| {
                let block = state.blocks.entry(key);
                block.or_insert_with(|| vec![0; BLOCK as usize].into_boxed_slice());
            });
        }
        Ok(())
    }

    async fn discard(&self, _: &Io<'_>, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.check(offset, bytes)?;
        state.clear(offset, offset + bytes);
        Ok(())
    }

    async fn truncate(&self, _: &Io<'_>, length: u64) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        if length < state.length {
            let end = state.length;
            state.clear(length, end);
        }
        state.length = length;
        state.truncates.push(length);
        Ok(())
    }

    /// One block at a time, so that the engine has to join them.
    async fn block_status(&self, _: &Io<'_>, offset: u64, bytes: u64) -> io::Result<Extent> {
        let state = self.0.lock().unwrap();
        state.check(offset, bytes)?;
        let key = offset / BLOCK;
        let next = state.blocks.range(key..).next().map(|(k, _)| *k);
        Ok(match next {
            Some(k) if k == key => Extent {
                bytes: BLOCK - offset % BLOCK,
                hole: false,
            },
            // Possibly longer than was asked for.
            _ => Extent {
                bytes: next.map_or(1 << 62, |k| k * BLOCK - offset),
                hole: true,
            },
        })
    }
}
