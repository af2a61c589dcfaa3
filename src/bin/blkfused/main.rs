//! blkfused: exports a disk image as a file.
fn main() {}
