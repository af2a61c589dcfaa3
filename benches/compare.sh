#!/usr/bin/env bash
# Measures blkfused beside the other programs that show a disk image as a file
# through FUSE, as far as they are installed: what each sustains on an 8 GiB
# null device, where only the way there and back costs time.
#
#   benches/compare.sh [options]
#     --runtime SECONDS   of each measurement (4)
#     --reps N            measurements of which the median is printed (3)
#     --only REGEX        only the systems whose name matches; blkfuse always
#     --workloads A,B     of: rr16 rw16 rr16x2 rw16x2 rr1 rw1 sr1M sw1M (all)
#     --blkfused PROGRAM  the daemon to measure (built with cargo otherwise)
#     --args 'ARGUMENTS'  more arguments for the daemon, such as '--threads 2'
#     --hosts             beside null.c, which answers through the C API, in
#                         each of its ways, instead of the other programs
#
# rr and rw are random reads and writes of 4 KiB, 16 at a time or 1; x2 means
# two clients; sr1M and sw1M are sequential, of 1 MiB, 8 at a time.
#
# Needs root, fio and a quiet machine. Every measurement starts its server
# afresh, and within a repetition the systems take turns, so that whatever
# changes meanwhile meets all of them. Differences below 30 % mean nothing.
set -euo pipefail

runtime=4 reps=3 only= workloads=rr16,rw16,rr16x2,rw16x2,rr1,rw1,sr1M,sw1M blkfused= extra= hosts=
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }
while [ $# -gt 0 ]; do
	case $1 in
	-h | --help) usage; exit ;;
	--hosts) hosts=1; shift ;;
	--runtime | --reps | --only | --workloads | --blkfused | --args)
		[ $# -ge 2 ] || { echo "compare: $1 needs a value" >&2; exit 2; }
		case $1 in
		--runtime) runtime=$2 ;;
		--reps) reps=$2 ;;
		--only) only=$2 ;;
		--workloads) workloads=$2 ;;
		--blkfused) blkfused=$2 ;;
		--args) extra=$2 ;;
		esac
		shift 2
		;;
	*) usage >&2; exit 2 ;;
	esac
done

die() { echo "compare: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null; }
have fio || die "fio is not installed"
[ -w /dev/fuse ] || die "needs /dev/fuse"

fio_args() { # workload
	case $1 in
	rr16) echo --rw=randread --bs=4k --ioengine=libaio --iodepth=16 --numjobs=1 ;;
	rw16) echo --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --numjobs=1 ;;
	rr16x2) echo --rw=randread --bs=4k --ioengine=libaio --iodepth=16 --numjobs=2 ;;
	rw16x2) echo --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --numjobs=2 ;;
	rr1) echo --rw=randread --bs=4k --ioengine=psync --iodepth=1 --numjobs=1 ;;
	rw1) echo --rw=randwrite --bs=4k --ioengine=psync --iodepth=1 --numjobs=1 ;;
	sr1M) echo --rw=read --bs=1M --ioengine=libaio --iodepth=8 --numjobs=1 ;;
	sw1M) echo --rw=write --bs=1M --ioengine=libaio --iodepth=8 --numjobs=1 ;;
	*) die "no workload is called $1" ;;
	esac
}

IFS=, read -ra loads <<<"$workloads"
for load in "${loads[@]}"; do fio_args "$load" >/dev/null; done

top=$(cd "$(dirname "$0")/.." && pwd)
built=${CARGO_TARGET_DIR:-$top/target}/release
if [ -z "$blkfused" ]; then
	(cd "$top" && cargo build -q --release --bin blkfused)
	blkfused=$built/blkfused
fi
[ -x "$blkfused" ] || die "$blkfused is not a program"

dir=$(mktemp -d)
if [ -n "$hosts" ]; then
	(cd "$top" && cargo build -q --release --lib)
	cc -O2 "$top/benches/null.c" -o "$dir/null" -I"$top/include" "$built/libblkfuse.a" -lpthread -ldl -lm
fi
at=$dir/disk server=
: >"$at"
is_mounted() { grep -q " $at " /proc/self/mounts; }
stop() {
	if [ -n "$server" ]; then
		kill "$server" 2>/dev/null || true
		for _ in $(seq 300); do
			kill -0 "$server" 2>/dev/null || break
			sleep 0.01
		done
		kill -KILL "$server" 2>/dev/null || true
		wait "$server" 2>/dev/null || true
		server=
	fi
	for _ in $(seq 100); do # one that unmounts last may be a moment late
		is_mounted || return 0
		sleep 0.01
	done
	umount -l "$at" || true
}
trap 'stop; rm -rf "$dir"' EXIT
trap 'exit 1' INT TERM

serve() { # system: runs its server in place of this shell
	case $1 in
	blkfuse)
		# shellcheck disable=SC2086 # its arguments are several words
		exec "$blkfused" -w $extra null:8G "$at"
		;;
	qsd)
		# Without growable=on some versions forget to ask for asynchronous I/O.
		exec qemu-storage-daemon \
			--blockdev null-co,node-name=n,size=$((8 << 30)),read-zeroes=off \
			--export "fuse,id=e,node-name=n,mountpoint=$at,writable=on,growable=on"
		;;
	nbdfuse) exec nbdfuse "$at" '[' nbdkit null 8G ']' ;;
	C,*) exec "$dir/null" "${1#C,}" "$at" ;;
	esac
}

start() { # system
	serve "$1" >"$dir/log" 2>&1 </dev/null &
	server=$!
	for _ in $(seq 1000); do
		if is_mounted && [ "$(stat -c %s "$at" 2>/dev/null)" = $((8 << 30)) ]; then
			return 0
		fi
		kill -0 "$server" 2>/dev/null || break
		sleep 0.01
	done
	sed "s/^/compare: $1: /" "$dir/log" >&2
	return 1
}

# One measurement: operations a second, and the median latency in microseconds.
measure() { # system workload
	local words side=7
	read -ra words <<<"$(fio_args "$2")"
	case $2 in *w1* | rw*) side=48 ;; esac
	start "$1" || { stop; return 0; }
	fio --name=compare --filename="$at" "${words[@]}" --direct=1 --size=4G \
		--time_based --runtime="$runtime" --ramp_time=500ms --norandommap \
		--randrepeat=0 --group_reporting --minimal --terse-version=3 \
		2>"$dir/fio" | awk -F';' -v side=$side '
		$1 == 3 && $5 == 0 { split($(side + 17), p50, "="); print $(side + 1), p50[2] }
	' || sed "s/^/compare: $1, $2: /" "$dir/fio" >&2
	stop
}

median() { sort -n | awk '{ v[NR] = $1 } END { if (NR) print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'; }

systems=(blkfuse)
for peer in qsd:qemu-storage-daemon nbdfuse:nbdfuse; do
	name=${peer%%:*}
	[ -z "$hosts" ] || continue
	[[ $name =~ $only ]] || continue
	if have "${peer#*:}" && { [ "$name" != nbdfuse ] || have nbdkit; }; then
		systems+=("$name")
	else
		echo "compare: no ${peer#*:} here: its row is missing" >&2
	fi
done

if [ -n "$hosts" ]; then
	systems+=(C,sync C,batch C,worker C,host)
fi

for ((rep = 1; rep <= reps; rep++)); do
	for load in "${loads[@]}"; do
		for system in "${systems[@]}"; do
			[ ! -t 2 ] || printf '\r%d/%d %-8s %-10s' "$rep" "$reps" "$load" "$system" >&2
			measure "$system" "$load" >>"$dir/$system.$load"
		done
	done
done
[ ! -t 2 ] || printf '\r%30s\r' '' >&2

echo "thousand operations/s (1M: MB/s), p50 us; below: blkfuse is so many times as fast"
echo "$(nproc) CPUs, Linux $(uname -r), $(fio --version), medians of $reps x $runtime s"
printf '%-10s' ''
printf '%16s' "${loads[@]}"
echo
for system in "${systems[@]}"; do
	printf '%-10s' "$system"
	for load in "${loads[@]}"; do
		cut -d' ' -f1 "$dir/$system.$load" | median >"$dir/iops"
		cut -d' ' -f2 "$dir/$system.$load" | median >"$dir/p50"
		paste -d' ' "$dir/iops" "$dir/p50" | awk -v mb="${load##*1M}" '
			NF == 2 { printf "%8.1f (%5d)", mb == "" ? $1 * 1.048576 : $1 / 1000, $2; done = 1 }
			END { if (!done) printf "%16s", "-" }'
		cp "$dir/iops" "$dir/$system.$load.median"
	done
	echo
done
for system in "${systems[@]:1}"; do
	printf '%-10s' "/ $system"
	for load in "${loads[@]}"; do
		paste -d' ' "$dir/blkfuse.$load.median" "$dir/$system.$load.median" |
			awk 'NF == 2 && $2 > 0 { printf "%15.2fx", $1 / $2; done = 1 }
			END { if (!done) printf "%16s", "-" }'
	done
	echo
done
