//! What the daemon's unit tests share.

use std::io;
use std::process::{Command, Output};

/// Says why a test does not run; that is itself a failure where
/// `BLKFUSE_NO_SKIP` is set.
pub fn skip(reason: &str) {
    assert!(
        std::env::var_os("BLKFUSE_NO_SKIP").is_none(),
        "must not be skipped: {reason}"
    );
    eprintln!("skipped: {reason}");
}

/// Runs a program to its end; `None` (and the test is skipped) if it is not
/// installed.
pub fn tool(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            skip(&format!("{program} is not installed"));
            None
        }
        Err(e) => panic!("{program}: {e}"),
    }
}
