#!/usr/bin/env bash
# ThreadSanitizer on the library inside c-examples/async.c, whose requests are
# completed by a pool of threads: fio and dd load the disk while it is drained
# again and again, and it ends in the middle of the load. Any report fails.
#
#   tests/tsan.sh [KEY=VALUE]...      # properties of the export, for example
#   tests/tsan.sh io-uring=on
#
# Needs root, clang, fio, and a nightly toolchain with
# rust-src. Installs nothing; leaves nothing running and nothing mounted.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "tsan: $*" >&2; exit 1; }
for tool in cargo rustup clang fio dd timeout; do
	command -v $tool >/dev/null || die "$tool is not installed"
done
[ -w /dev/fuse ] || die "needs /dev/fuse"
rust=$(rustup run nightly rustc --print sysroot 2>/dev/null) ||
	die "no nightly toolchain: rustup toolchain install nightly"
[ -d "$rust/lib/rustlib/src/rust/library/std" ] ||
	die "no sources of std: rustup component add --toolchain nightly rust-src"
target=x86_64-unknown-linux-gnu
# Rust's own: clang's may be too old for what rustc generates.
runtime=$rust/lib/rustlib/$target/lib/librustc-nightly_rt.tsan.a
[ -f "$runtime" ] || die "the nightly toolchain has no ThreadSanitizer for $target"

build=${CARGO_TARGET_DIR:-target}/tsan
RUSTFLAGS=-Zsanitizer=thread cargo +nightly build -q -Zbuild-std --target $target \
	--target-dir "$build" --lib --no-default-features
clang -g -O1 -Wall -Iinclude -fsanitize=thread -c c-examples/async.c -o "$build/async.o"
clang "$build/async.o" "$build/$target/debug/libblkfuse.a" \
	-Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -Wl,--export-dynamic \
	-pthread -lrt -ldl -lm -lgcc_s -o "$build/async"

work=$(mktemp -d)
host= clients=()
# The watchdog of every step: whoever hangs in the mount is let go by its end.
unhang() { while umount -c -f -l "$work/disk" 2>/dev/null; do :; done; }
cleanup() {
	for pid in "${clients[@]}" $host; do kill "$pid" 2>/dev/null || :; done
	unhang
	wait
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# The order of clients' accesses to the same bytes of the disk passes through
# the kernel, where ThreadSanitizer does not see it.
echo 'race:^data$' >"$work/suppressions"
export TSAN_OPTIONS="exitcode=66 suppressions=$work/suppressions log_path=$work/report"

# Says why, and all that was said before.
failed() {
	cat "$work"/{fio,out,report.*} >&2 2>/dev/null || :
	die "$*"
}

# Waits until the process is gone; fails if that takes too long.
await() { # pid, seconds, what
	timeout "$2" tail --pid="$1" -f /dev/null || failed "$3 hangs"
	wait "$1"
}

run() { # queues [KEY=VALUE]...
	echo "tsan: $*"
	: >"$work/disk"
	"$build/async" "$work/disk" "$@" >"$work/out" 2>&1 &
	host=$!
	for _ in $(seq 300); do
		grep -q 'is a disk of' "$work/out" && break
		kill -0 $host 2>/dev/null || failed "async does not start"
		sleep 0.1
	done

	# Each job has a region of its own; the last one runs into the end.
	fio --name=load --filename="$work/disk" --size=12M --offset_increment=12M --numjobs=4 \
		--rw=randrw --bsrange=4k-256k --ioengine=libaio --iodepth=8 --direct=1 --fsync=16 \
		--serialize_overlap=1 --time_based --runtime=5 --group_reporting \
		--output="$work/fio" &
	clients=($!)
	dd if=/dev/urandom of="$work/disk" bs=1M seek=50 count=8 oflag=direct conv=notrunc status=none &
	clients+=($!)
	local drained
	while kill -0 "${clients[0]}" 2>/dev/null; do
		drained=$(grep -c drained "$work/out" || :)
		kill -USR1 $host || failed "async has ended early"
		timeout 30 bash -c "until [ \$(grep -c drained '$work/out') -gt $drained ]; do sleep 0.02; done" ||
			failed "a drain hangs"
	done
	for pid in "${clients[@]}"; do
		await "$pid" 60 "a client" || failed "a client failed"
	done

	# The end of the export in the middle of the load.
	dd if="$work/disk" of=/dev/null bs=64k iflag=direct status=none 2>/dev/null &
	clients=($!)
	kill -TERM $host
	local status=0
	await $host 60 "the end" || status=$?
	host=
	await "${clients[0]}" 60 "a client" || : # it may have lost its disk
	clients=()
	[ $status = 0 ] || failed "async ended with $status"
	echo "tsan: no report in $(grep -c drained "$work/out") drains and $(grep drained "$work/out" | tail -1 | cut -d' ' -f3-)"
}

for queues in 1 4; do
	run $queues "$@"
done
