//! The shortest proof of life: a file is there, can be read and written, and
//! is gone afterwards.

mod common;

use std::os::unix::fs::FileExt;

use common::{Mounted, for_queues, is_mounted, pattern};

#[test]
fn a_device_appears_as_a_file_and_vanishes() {
    for_queues(|queues| {
        let mut m = Mounted::fixed(100_000, queues);
        let file = m.open(true);
        let mut back = vec![0; 100_000];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, pattern(0, 100_000));
        file.write_all_at(b"hello", 12_345).unwrap();
        assert_eq!(&m.driver.bytes()[12_345..12_350], b"hello");
        assert!(is_mounted(&m.path));
        drop(file);
        m.delete();
        assert!(!is_mounted(&m.path));
    });
}
