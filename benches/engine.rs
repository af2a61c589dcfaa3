//! How long one request takes through the whole engine, without a kernel:
//!
//! ```sh
//! cargo bench --features bench --bench engine
//! ```

use blkfuse::bench::{Bench, REQUESTS};
use criterion::{Criterion, criterion_group, criterion_main};

fn engine(criterion: &mut Criterion) {
    for (name, request) in REQUESTS {
        let mut bench = Bench::new(request);
        criterion.bench_function(name, |bencher| bencher.iter(|| bench.serve()));
    }
}

criterion_group!(benches, engine);
criterion_main!(benches);
