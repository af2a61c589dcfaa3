//! blkfused: exports disk images as files.

mod direct;
mod failure;
mod image;
mod lock;
mod null;
mod probe;
mod ram;
mod raw;
mod size;
#[cfg(test)]
mod testing;

fn main() {}
