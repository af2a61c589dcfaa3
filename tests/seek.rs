//! SEEK_DATA and SEEK_HOLE show the image's map.

mod common;

use std::io;

use common::client::{aio_read, errno, seek};
use common::sparse::{BLOCK, Exported, Sparse};
use common::{Call, Mounted, for_queues};
use libc::{SEEK_DATA, SEEK_HOLE};

/// Where the next byte is that is data (or not), within `map` of blocks.
fn model(map: &[bool], length: u64, from: u64, data: bool) -> Option<u64> {
    if from >= length {
        return None;
    }
    let starts = (from / BLOCK + 1..).map(|block| block * BLOCK);
    let found = std::iter::once(from)
        .chain(starts)
        .take_while(|at| *at < length)
        .find(|at| map[(at / BLOCK) as usize] == data);
    match found {
        None if !data => Some(length),
        found => found,
    }
}

fn check(file: &std::fs::File, map: &[bool], length: u64, from: u64) {
    for (whence, data) in [(SEEK_DATA, true), (SEEK_HOLE, false)] {
        let result = seek(file, from as i64, whence);
        match model(map, length, from, data) {
            Some(at) => assert_eq!(result.unwrap(), at, "from {from}, data: {data}"),
            None => assert_eq!(errno(result), libc::ENXIO, "from {from}, data: {data}"),
        }
    }
}

#[test]
fn a_fragmented_image_is_shown_as_it_is() {
    // Runs of every length from 1 to 6, of both kinds.
    let runs: Vec<bool> = (1..=6)
        .flat_map(|n| [vec![false; n], vec![true; 7 - n]].concat())
        .collect();
    let inverse: Vec<bool> = runs.iter().map(|b| !b).collect();
    for_queues(|queues| {
        for map in [&runs, &inverse, &vec![true; 9], &vec![false; 9]] {
            for cut in [0, 1, 4095] {
                let length = map.len() as u64 * BLOCK - cut;
                let sparse = Sparse::new(length);
                for (i, _) in map.iter().enumerate().filter(|(_, data)| **data) {
                    sparse.put_block(i as u64, 1);
                }
                let e = Exported::with(sparse, queues, |b| b);
                let file = e.open();
                for block in 0..map.len() as u64 {
                    for within in [0, 1, 2048, 4095] {
                        check(&file, map, length, block * BLOCK + within);
                    }
                }
                for from in [length - 1, length, length + 1, length + 5000, 1 << 62] {
                    check(&file, map, length, from);
                }
            }
        }
    });
}

#[test]
fn more_extents_than_one_search_takes_in_a_row() {
    for_queues(|queues| {
        // Joined by the engine: all data, then one hole at the end.
        let blocks = 2000;
        let sparse = Sparse::new((blocks + 1) * BLOCK);
        for i in 0..blocks {
            sparse.put_block(i, 1);
        }
        let e = Exported::with(sparse, queues, |b| b);
        assert_eq!(seek(&e.open(), 5, SEEK_HOLE).unwrap(), blocks * BLOCK);
    });
}

#[test]
fn a_driver_without_a_map_has_no_holes() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_001, queues);
        m.driver.fail_if(|call, _, _| {
            (call == Call::BlockStatus).then(|| io::ErrorKind::Unsupported.into())
        });
        let file = m.open(false);
        for from in [0, 1, 5000, 10_000] {
            assert_eq!(seek(&file, from, SEEK_DATA).unwrap(), from as u64);
            assert_eq!(seek(&file, from, SEEK_HOLE).unwrap(), 10_001);
        }
        assert_eq!(errno(seek(&file, 10_001, SEEK_DATA)), libc::ENXIO);
        assert_eq!(errno(seek(&file, 10_001, SEEK_HOLE)), libc::ENXIO);
    });
}

#[test]
fn an_empty_file_has_neither() {
    for_queues(|queues| {
        let m = Mounted::growable(0, queues);
        let file = m.open(true);
        assert_eq!(errno(seek(&file, 0, SEEK_DATA)), libc::ENXIO);
        assert_eq!(errno(seek(&file, 0, SEEK_HOLE)), libc::ENXIO);
        assert_eq!(errno(seek(&file, -1, SEEK_HOLE)), libc::ENXIO);
    });
}

#[test]
fn a_failure_is_reported_once_and_reading_goes_on() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_001, queues);
        let file = m.open(false);
        for (says, arrives) in [(libc::EIO, libc::EIO), (libc::EINVAL, libc::EINVAL)] {
            m.driver.fail_if(move |call, _, _| {
                (call == Call::BlockStatus).then(|| io::Error::from_raw_os_error(says))
            });
            assert_eq!(errno(seek(&file, 0, SEEK_HOLE)), arrives);
            let mut buf = [0; 100];
            assert_eq!(aio_read(&file, &mut [(0, &mut buf)]), [100]);
        }
        m.driver.fail_never();
        assert_eq!(seek(&file, 0, SEEK_HOLE).unwrap(), 10_001);
    });
}

#[test]
fn the_other_kinds_of_seeking_work() {
    for_queues(|queues| {
        let m = Mounted::fixed(10_001, queues);
        let file = m.open(false);
        assert_eq!(seek(&file, 0, libc::SEEK_END).unwrap(), 10_001);
        assert_eq!(seek(&file, -1, libc::SEEK_END).unwrap(), 10_000);
        assert_eq!(seek(&file, -500, libc::SEEK_CUR).unwrap(), 9500);
        assert_eq!(seek(&file, 7, libc::SEEK_SET).unwrap(), 7);
        assert_eq!(errno(seek(&file, -1, libc::SEEK_SET)), libc::EINVAL);
        assert_eq!(errno(seek(&file, 0, 99)), libc::EINVAL);
    });
}
