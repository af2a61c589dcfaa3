//! Random sequences of operations on a real mount do what they do to a plain
//! vector of bytes.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::client::{aio_read, aio_write, errno, fallocate, seek, size};
use common::{Memory, Mounted, pattern};
use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use memmap2::MmapMut;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Action {
    Read {
        at: u64,
        len: usize,
        aio: bool,
    },
    Write {
        at: u64,
        len: usize,
        aio: bool,
    },
    /// Through a shared map, within the file.
    Map {
        at: u64,
        len: usize,
    },
    Append {
        len: usize,
    },
    SetLen(u64),
    /// fallocate with a mode.
    Allocate {
        mode: i32,
        at: u64,
        len: u64,
    },
    Seek {
        at: u64,
        hole: bool,
    },
    Sync,
    Reopen,
}

const PUNCH: i32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = FALLOC_FL_ZERO_RANGE;

/// Mostly small and near each other, sometimes aligned, sometimes of more
/// than one request.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..40_000,
        2 => (0u64..20).prop_map(|block| block * 4096),
        1 => 0u64..2_500_000,
    ]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 1usize..6_000,
        2 => (1usize..8).prop_map(|blocks| blocks * 4096),
        1 => 1usize..1_300_000,
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let modes = prop::sample::select(vec![0, PUNCH, ZERO, ZERO | FALLOC_FL_KEEP_SIZE]);
    prop_oneof![
        3 => (offset(), length(), any::<bool>())
            .prop_map(|(at, len, aio)| Action::Read { at, len, aio }),
        5 => (offset(), length(), any::<bool>())
            .prop_map(|(at, len, aio)| Action::Write { at, len, aio }),
        1 => (offset(), length()).prop_map(|(at, len)| Action::Map { at, len }),
        2 => length().prop_map(|len| Action::Append { len }),
        2 => offset().prop_map(Action::SetLen),
        3 => (modes, offset(), length())
            .prop_map(|(mode, at, len)| Action::Allocate { mode, at, len: len as u64 }),
        3 => (offset(), any::<bool>()).prop_map(|(at, hole)| Action::Seek { at, hole }),
        1 => Just(Action::Sync),
        1 => Just(Action::Reopen),
    ]
}

struct Model {
    bytes: Vec<u8>,
    growable: bool,
    /// So that no two writes write the same.
    writes: usize,
}

impl Model {
    fn fresh(&mut self, len: usize) -> Vec<u8> {
        self.writes += 1;
        let mut data = pattern(self.writes * 1_000_003, len);
        // Sometimes zeroes, so that there are holes to find.
        if self.writes.is_multiple_of(5) {
            data.fill(0);
        }
        data
    }

    /// Writes; returns what the client is told.
    fn write(&mut self, at: usize, data: &[u8]) -> Result<usize, i32> {
        let mut end = at + data.len();
        if end > self.bytes.len() {
            if self.growable {
                self.bytes.resize(end, 0);
            } else if at >= self.bytes.len() {
                return Err(libc::ENOSPC);
            } else {
                end = self.bytes.len();
            }
        }
        self.bytes[at..end].copy_from_slice(&data[..end - at]);
        Ok(end - at)
    }

    /// The next byte of a hole, or of data: blocks of zeroes are holes.
    fn seek(&self, at: usize, hole: bool) -> Result<u64, i32> {
        let len = self.bytes.len();
        if at >= len {
            return Err(libc::ENXIO);
        }
        let is_hole = |at: usize| {
            let start = at / 4096 * 4096;
            self.bytes[start..len.min(start + 4096)]
                .iter()
                .all(|b| *b == 0)
        };
        let starts = (at / 4096 + 1..).map(|block| block * 4096);
        let found = std::iter::once(at)
            .chain(starts)
            .take_while(|at| *at < len)
            .find(|at| is_hole(*at) == hole);
        match found {
            Some(at) => Ok(at as u64),
            None if hole => Ok(len as u64),
            None => Err(libc::ENXIO),
        }
    }
}

fn outcome<T: std::fmt::Debug>(result: std::io::Result<T>) -> Result<T, i32> {
    match result {
        Ok(value) => Ok(value),
        Err(_) => Err(errno(result)),
    }
}

fn check(m: &Mounted, file: &mut File, model: &mut Model, action: &Action) {
    let here = |at: u64| at as usize;
    match *action {
        Action::Read { at, len, aio } => {
            let mut back = vec![0xee; len];
            let n = if aio {
                aio_read(file, &mut [(at, &mut back)])[0] as usize
            } else {
                file.read_at(&mut back, at).unwrap()
            };
            let start = here(at).min(model.bytes.len());
            let end = (here(at) + len).min(model.bytes.len());
            assert_eq!(n, end - start);
            assert!(back[..n] == model.bytes[start..end]);
        }
        Action::Write { at, len, aio } => {
            // Asynchronous ones that cross a fixed end may fail as a whole;
            // the end has its own tests.
            let crosses = at + len as u64 > model.bytes.len() as u64;
            let aio = aio && (model.growable || !crosses);
            let data = model.fresh(len);
            let expected = model.write(here(at), &data);
            if aio {
                let result = aio_write(file, &[(at, &data)])[0];
                assert_eq!(result, expected.unwrap() as i32);
            } else {
                assert_eq!(outcome(file.write_at(&data, at)), expected);
            }
        }
        Action::Map { at, len } => {
            let size = model.bytes.len();
            if here(at) < size {
                let len = len.min(size - here(at));
                let data = model.fresh(len);
                // SAFETY: one thread, and no other use until it is dropped.
                let mut map = unsafe { MmapMut::map_mut(&*file) }.unwrap();
                map[here(at)..][..len].copy_from_slice(&data);
                map.flush().unwrap();
                drop(map);
                model.bytes[here(at)..][..len].copy_from_slice(&data);
            }
        }
        Action::Append { len } => {
            use std::io::Write;
            let mut appender = File::options().append(true).open(&m.path).unwrap();
            let data = model.fresh(len);
            let expected = model.write(model.bytes.len(), &data);
            assert_eq!(outcome(appender.write(&data)), expected);
        }
        Action::SetLen(len) => {
            file.set_len(len).unwrap();
            model.bytes.resize(len as usize, 0);
        }
        Action::Allocate { mode, at, len } => {
            fallocate(file, mode, at, len).unwrap();
            let size = model.bytes.len();
            let end = here(at) + len as usize;
            if mode != 0 {
                let end = end.min(size);
                model.bytes[here(at).min(end)..end].fill(0);
            }
            if mode & FALLOC_FL_KEEP_SIZE == 0 {
                model.bytes.resize(size.max(end), 0);
            }
        }
        Action::Seek { at, hole } => {
            let whence = if hole {
                libc::SEEK_HOLE
            } else {
                libc::SEEK_DATA
            };
            let result = outcome(seek(file, at as i64, whence));
            assert_eq!(result, model.seek(here(at), hole));
        }
        Action::Sync => file.sync_all().unwrap(),
        Action::Reopen => *file = m.open(true),
    }
    assert_eq!(size(file), model.bytes.len() as u64);
    assert!(
        m.driver.bytes() == model.bytes,
        "the image after {action:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        // A case that hangs is the watchdog's.
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_file_is_what_a_vector_of_bytes_would_be(
        queues in prop::sample::select(common::QUEUES.to_vec()),
        growable: bool,
        native_zeroes: bool,
        direct: bool,
        start in 0usize..100_000,
        actions in prop::collection::vec(action(), 1..40),
    ) {
        if !common::can_export() {
            return Ok(());
        }
        let mut driver = Memory::patterned(start);
        driver.native_zeroes = native_zeroes;
        let m = Mounted::with(driver, queues, |b| b.growable(growable));
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let mut file = m.open_with(true, flags);
        let mut model = Model { bytes: pattern(0, start), growable, writes: 0 };
        for action in &actions {
            check(&m, &mut file, &mut model, action);
        }
    }
}
