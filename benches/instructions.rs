//! Serves as many requests of one kind as its arguments say, for
//! benches/instructions.sh to count the instructions of.

use std::process::ExitCode;

use blkfuse::bench::{Bench, REQUESTS};

fn main() -> ExitCode {
    // cargo adds --bench to what it is given.
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let (name, count) = match &arguments[..] {
        [name, count, ..] => (name, count.parse::<u64>().ok()),
        _ => (&String::new(), None),
    };
    let request = REQUESTS.iter().find(|(known, _)| known == name);
    let (Some((_, request)), Some(count)) = (request, count) else {
        eprintln!("usage: instructions read|write|getattr COUNT; see benches/instructions.sh");
        return ExitCode::from(2);
    };
    let mut bench = Bench::new(*request);
    (0..count).for_each(|_| bench.serve());
    ExitCode::SUCCESS
}
