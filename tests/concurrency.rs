//! Many clients at once.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use common::client::{aio_read, aio_write, size};
use common::{Memory, Mounted, for_queues, pattern};

#[test]
fn two_hundred_descriptors_at_once() {
    for_queues(|queues| {
        let m = Mounted::fixed(1 << 20, queues);
        let files: Vec<_> = (0..200)
            .map(|i| m.open_with(true, if i % 2 == 0 { 0 } else { libc::O_DIRECT }))
            .collect();
        for (i, file) in files.iter().enumerate() {
            file.write_all_at(&[i as u8; 5000], i as u64 * 5000)
                .unwrap();
        }
        for (i, file) in files.iter().rev().enumerate() {
            let mut back = [0; 5000];
            file.read_exact_at(&mut back, i as u64 * 5000).unwrap();
            assert!(back == [i as u8; 5000]);
        }
        // Closing some leaves the others alone.
        let rest: Vec<_> = files.into_iter().skip(150).collect();
        for file in &rest {
            file.read_exact_at(&mut [0; 100], 0).unwrap();
        }
    });
}

#[test]
fn eight_readers_and_eight_writers_of_ranges_of_their_own() {
    const RANGE: usize = 200_003;
    for_queues(|queues| {
        // The first eight ranges are read, the others written.
        let m = Mounted::fixed(16 * RANGE, queues);
        std::thread::scope(|scope| {
            for i in 0..8usize {
                let flags = if i % 2 == 0 { 0 } else { libc::O_DIRECT };
                let (reader, writer) = (m.open_with(false, flags), m.open_with(true, flags));
                scope.spawn(move || {
                    let mut back = vec![0; RANGE];
                    for _ in 0..30 {
                        let at = i * RANGE;
                        reader.read_exact_at(&mut back, at as u64).unwrap();
                        assert!(back == pattern(at, RANGE));
                    }
                });
                scope.spawn(move || {
                    let at = (8 + i) * RANGE;
                    for round in 0..30 {
                        let data = pattern(at + round * 1001 + 1, RANGE);
                        writer.write_all_at(&data, at as u64).unwrap();
                        let mut back = vec![0; RANGE];
                        writer.read_exact_at(&mut back, at as u64).unwrap();
                        assert!(back == data, "round {round}");
                    }
                });
            }
        });
        let bytes = m.driver.bytes();
        assert!(bytes[..8 * RANGE] == pattern(0, 8 * RANGE));
        for i in 8..16 {
            let expected = pattern(i * RANGE + 29 * 1001 + 1, RANGE);
            assert!(bytes[i * RANGE..][..RANGE] == expected);
        }
    });
}

/// Every block is written as a whole, by one request; so is whole what is
/// read, and at the end the last write of some writer is there.
#[test]
fn eight_readers_and_eight_writers_of_the_same_blocks() {
    const BLOCK: usize = 4096;
    const BLOCKS: usize = 16;
    for_queues(|queues| {
        let m = Mounted::with(Memory::new(vec![0; BLOCK * BLOCKS]), queues, |b| b);
        let writing = AtomicUsize::new(8);
        let start = Barrier::new(16);
        let whole = |block: &[u8]| block.iter().all(|b| *b == block[0]);
        std::thread::scope(|scope| {
            for i in 0..8usize {
                let flags = if i % 2 == 0 { 0 } else { libc::O_DIRECT };
                let (reader, writer) = (m.open_with(false, flags), m.open_with(true, flags));
                let (writing, start) = (&writing, &start);
                scope.spawn(move || {
                    start.wait();
                    for round in 0..200 {
                        let data = [(round * 8 + i) as u8; BLOCK];
                        let at = (round * (2 * i + 1)) % BLOCKS * BLOCK;
                        writer.write_all_at(&data, at as u64).unwrap();
                    }
                    writing.fetch_sub(1, SeqCst);
                });
                scope.spawn(move || {
                    start.wait();
                    let mut at = i;
                    let mut block = [0; BLOCK];
                    while writing.load(SeqCst) > 0 {
                        at = (at + 3) % BLOCKS;
                        reader
                            .read_exact_at(&mut block, (at * BLOCK) as u64)
                            .unwrap();
                        assert!(whole(&block), "a torn block");
                    }
                });
            }
        });
        let bytes = m.driver.bytes();
        assert!(bytes.chunks(BLOCK).all(whole));
    });
}

#[test]
fn asynchronous_requests_are_in_flight_together() {
    const READS: usize = 32;
    for_queues(|queues| {
        let m = Mounted::fixed(1 << 20, queues);
        m.driver.hold();
        std::thread::scope(|scope| {
            let file = m.open_with(false, libc::O_DIRECT);
            scope.spawn(move || {
                let mut buffers = vec![[0; 512]; READS];
                let mut reads: Vec<_> = buffers
                    .iter_mut()
                    .enumerate()
                    .map(|(i, b)| (i as u64 * 512, &mut b[..]))
                    .collect();
                assert_eq!(aio_read(&file, &mut reads), vec![512; READS]);
                assert!(buffers.concat() == pattern(0, READS * 512));
            });
            m.driver.wait_for_held(READS);
            // Looking at the file does not wait for them.
            assert_eq!(size(&m.open(false)), 1 << 20);
            m.driver.release();
        });
    });
}

#[test]
fn more_requests_than_there_are_slots_all_get_their_turn() {
    const WRITES: usize = 1000;
    for_queues(|queues| {
        let m = Mounted::fixed(WRITES * 600, queues);
        let data = pattern(7, WRITES * 600);
        m.driver.hold();
        std::thread::scope(|scope| {
            let (file, data) = (m.open_with(true, libc::O_DIRECT), &data);
            scope.spawn(move || {
                let writes: Vec<_> = data
                    .chunks(600)
                    .enumerate()
                    .map(|(i, c)| (i as u64 * 600, c))
                    .collect();
                assert_eq!(aio_write(&file, &writes), vec![600; WRITES]);
            });
            m.driver.wait_for_held(64);
            m.driver.release();
        });
        assert!(m.driver.bytes() == data);
    });
}
