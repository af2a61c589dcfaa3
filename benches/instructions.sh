#!/usr/bin/env bash
# Counts the instructions that one request costs on its way through the whole
# engine, from a transport in memory to a driver that does nothing and back,
# and fails if there are more than benches/instructions.budget allows.
#
#   benches/instructions.sh            # counts and compares
#   benches/instructions.sh --update   # writes a new budget: the counts + 10 %
#
# The counts depend on the compiler but not on the machine's speed or load.
# They are callgrind's for 2N requests less those for N, so that what happens
# once does not count. Needs valgrind.
set -euo pipefail
cd "$(dirname "$0")/.."

update=
case ${1-} in
'') ;;
--update) update=1 ;;
*) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
budget=benches/instructions.budget
die() { echo "instructions: $*" >&2; exit 1; }
command -v valgrind >/dev/null || die "valgrind is not installed"

program=$(cargo bench -q --features bench --bench instructions --no-run --message-format=json |
	sed -n 's/.*"executable":"\([^"]*\/instructions-[^"]*\)".*/\1/p')
[ -x "$program" ] || die "cargo has not built the benchmark"

collected() { # request, how often
	valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$1" "$2" 2>&1 |
		sed -n 's/^==[0-9]*== Collected : //p'
}

n=1000 failed=0 counts=
printf '%-10s %12s %10s\n' request instructions budget
for request in read write getattr; do
	once=$(collected $request $n) twice=$(collected $request $((2 * n)))
	[ -n "$once" ] && [ -n "$twice" ] || die "callgrind has counted nothing for $request"
	count=$(((twice - once) / n))
	counts+="$request $((count * 110 / 100))"$'\n'
	limit=$(sed -n "s/^$request //p" $budget)
	[ -n "$limit" ] || [ -n "$update" ] || die "$budget says nothing of $request"
	printf '%-10s %12d %10s\n' $request $count "${limit:--}"
	[ -n "$limit" ] && [ "$count" -le "$limit" ] || failed=1
done

if [ -n "$update" ]; then
	{ sed -n '/^#/p' $budget; printf %s "$counts"; } >$budget.new
	mv $budget.new $budget
	echo "wrote $budget"
elif [ $failed = 1 ]; then
	die "a request costs more than its budget. If it is worth that, raise the
budget with benches/instructions.sh --update, and say why in the commit."
fi
