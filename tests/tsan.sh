#!/usr/bin/env bash
# ThreadSanitizer on the library inside the C examples that have threads, or for
# which it makes some. fio and dd load the disk of each, over both transports
# where root has enabled the second; async's is drained meanwhile, again and
# again, and emulator's is moved, frozen and made longer; and each example ends in the middle of a load. Any report fails.
# (plugin.c has no threads: those that call it are blkfused's.)
#
#   tests/tsan.sh [EXAMPLE]...      # all, if none is named: async raw nbd ramdisk emulator
#
# Needs root, clang, llvm-symbolizer, fio, libnbd, nbdkit, and a nightly
# toolchain with rust-src. Installs nothing; leaves nothing running and nothing
# mounted.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "tsan: $*" >&2; exit 1; }
for tool in cargo rustup clang llvm-symbolizer fio dd nbdkit timeout; do
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
[ $# -gt 0 ] || set -- async raw nbd ramdisk emulator

build=$(realpath -m "${CARGO_TARGET_DIR:-target}/tsan")
# Reports need no more of what there is for debuggers.
RUSTFLAGS=-Zsanitizer=thread CARGO_PROFILE_DEV_DEBUG=line-tables-only \
	cargo +nightly build -q -Zbuild-std=std --target $target \
	--target-dir "$build" --lib --no-default-features
for example in "$@"; do
	libraries=()
	[ $example != nbd ] || libraries=(-lnbd)
	clang -g -O1 -Wall -Iinclude -fsanitize=thread -c c-examples/$example.c -o "$build/$example.o"
	clang "$build/$example.o" "$build/$target/debug/libblkfuse.a" \
		-Wl,--whole-archive "$runtime" -Wl,--no-whole-archive -Wl,--export-dynamic \
		-pthread -lrt -ldl -lm -lgcc_s "${libraries[@]}" -o "$build/$example"
done

work=$(mktemp -d)
host= server= clients=()
# Whoever hangs in the mount is let go by its end.
unhang() { while umount -c -f -l "$work/disk" 2>/dev/null; do :; done; }
# Every wait below has an end; this is for what has none although it should.
(
	trap 'kill $!; exit' TERM
	sleep 300 &
	wait $!
	echo "tsan: takes too long: ending it" >&2
	unhang
	kill $$
) &
watchdog=$!
cleanup() {
	kill $watchdog 2>/dev/null || :
	for pid in "${clients[@]}" $host $server; do kill "$pid" 2>/dev/null || :; done
	unhang
	for pid in "${clients[@]}" $host $server; do
		timeout 20 tail -s 0.1 --pid="$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || :
	done
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

export TSAN_OPTIONS="exitcode=66 suppressions=$work/suppressions log_path=$work/report"

# Says why, and all that was said before.
failed() {
	cat "$work"/{fio,out,report.*} >&2 2>/dev/null || :
	die "$*"
}

# Waits until the process is gone; fails if that takes too long.
await() { # pid, seconds, what
	timeout "$2" tail -s 0.1 --pid="$1" -f /dev/null || failed "$3 hangs"
	wait "$1"
}

# Waits until a condition holds.
await_that() { # seconds, what is wrong if it does not, condition
	timeout "$1" bash -c "until $3; do sleep 0.02; done" || failed "$2"
}

# Drains async while a process runs.
drain_during() { # pid
	local drained end=$((SECONDS + 60))
	while kill -0 "$1" 2>/dev/null; do
		[ $SECONDS -lt $end ] || failed "a client hangs"
		drained=$(grep -c drained "$work/out" || :)
		kill -USR1 $host || failed "async has ended early"
		await_that 30 "a drain hangs" "[ \$(grep -c drained '$work/out') -gt $drained ]"
	done
}

# Has emulator do what it can while a process runs.
command_during() { # pid
	local command answers=1 length=$((64 << 20)) end=$((SECONDS + 60))
	while kill -0 "$1" 2>/dev/null; do
		for command in move snapshot move stats resize; do
			[ $SECONDS -lt $end ] || failed "a client hangs"
			[ $command != resize ] || command="resize $((length += 4096))"
			echo "$command" >&"$commands"
			answers=$((answers + 1))
			await_that 30 "'$command' has no answer" "[ \$(wc -l <'$work/out') -ge $answers ]"
		done
	done
}

run() { # example, transport, queues
	local example=$1 uring=io-uring=$2 queues=$3 race= input=/dev/null commands
	echo "tsan: $example, io-uring=$2, $queues queue(s)"
	: >"$work/disk"
	case $example in
	async)
		set -- "$work/disk" "$queues" "$uring"
		race=data
		;;
	ramdisk)
		set -- "$work/disk" "$queues"
		race=disk
		;;
	raw)
		truncate -s 64M "$work/image"
		set -- "$work/image" "$work/disk" "queues=$queues" writable=on "$uring"
		;;
	emulator)
		truncate -s 64M "$work/image"
		mkfifo "$work/commands"
		# Open for both, so that its input does not end with a command's writer.
		exec {commands}<>"$work/commands"
		input=$work/commands
		set -- "$work/image" "$work/disk" 2 "queues=$queues" "$uring"
		;;
	nbd)
		rm -f "$work"/{listens,socket}
		nbdkit -f -U "$work/socket" -P "$work/listens" memory 64M &
		server=$!
		await_that 20 "nbdkit does not start" "[ -e '$work/listens' ]"
		set -- "nbd+unix:///?socket=$work/socket" "$work/disk" "connections=$queues" "$uring"
		;;
	esac
	# The order of clients' accesses to the same bytes of the disk passes through
	# the kernel, where ThreadSanitizer does not see it.
	echo "${race:+race:^$race\$}" >"$work/suppressions"
	(cd "$work" && exec "$build/$example" "$@" <"$input" >out 2>&1) &
	host=$!
	await_that 30 "$example does not start" "grep -Eq 'until this ends|is a disk of' '$work/out'"

	# Each job has a region of its own; the last one runs into the end.
	fio --name=load --filename="$work/disk" --size=12M --offset_increment=12M --numjobs=4 \
		--rw=randrw --bsrange=4k-256k --ioengine=libaio --iodepth=8 --direct=1 --fsync=16 \
		--serialize_overlap=1 --time_based --runtime=3 --group_reporting \
		--output="$work/fio" &
	clients=($!)
	dd if=/dev/urandom of="$work/disk" bs=1M seek=50 count=8 oflag=direct conv=notrunc status=none &
	clients+=($!)
	[ $example != async ] || drain_during "${clients[0]}"
	[ $example != emulator ] || command_during "${clients[0]}"
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
	[ $status = 0 ] || failed "$example ended with $status"
	! grep -q " $work/disk " /proc/mounts || failed "$example has left its disk mounted"
	[ $example != async ] ||
		echo "tsan: $(grep -c drained "$work/out") drains and $(grep drained "$work/out" | tail -1 | cut -d' ' -f3-)"
	if [ $example = emulator ]; then
		exec {commands}>&-
		rm "$work/commands"
		! grep -Ev '^ok |^failed: Too many links' "$work/out" || failed "emulator has failed"
		echo "tsan: $(grep -c 'runs in thread' "$work/out") moves"
	fi
	[ -z "$server" ] || kill $server
	server=
}

transports=(off)
[ "$(cat /sys/module/fuse/parameters/enable_uring 2>/dev/null)" != Y ] || transports+=(on)
for example in "$@"; do
	over=("${transports[@]}")
	# It takes no properties: the transport is what comes of itself.
	[ $example != ramdisk ] || over=(auto)
	for transport in "${over[@]}"; do
		[[ $example != @(async|emulator) ]] || run $example $transport 1
		run $example $transport 4
	done
done
echo "tsan: no report"
