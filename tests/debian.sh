#!/usr/bin/env bash
# Builds the Debian packages, installs them on this machine, tries what they
# have as their users would, and removes them.
#
# Needs root, /dev/fuse, debhelper, gcc, pkg-config, man and cargo-c. Refuses
# where one of the packages is installed. Leaves nothing running and nothing
# mounted.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "debian: $*" >&2; exit 1; }
for tool in cargo cargo-cinstall dh dpkg gcc pkg-config man timeout; do
	command -v $tool >/dev/null || die "$tool is not installed"
done
[ "$(id -u)" = 0 ] || die "needs root"
[ -w /dev/fuse ] || die "needs /dev/fuse"
packages=(libblkfuse0 libblkfuse-dev blkfuse)
for package in "${packages[@]}"; do
	! dpkg -s $package >/dev/null 2>&1 || die "$package is installed"
done

debs=${CARGO_TARGET_DIR:-target}/debian
debian/rules clean binary
debian/rules clean

work=$(mktemp -d)
host=
unhang() { while umount -f -l "$work/disk" 2>/dev/null; do :; done; }
cleanup() {
	[ -z "$host" ] || kill $host 2>/dev/null || :
	unhang
	dpkg -P blkfuse libblkfuse-dev libblkfuse0 >/dev/null 2>&1 || :
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

# What is in the packages, with the library's version in the place of *.
expected='blkfuse usr/bin/blkfused
blkfuse usr/share/man/man1/blkfused.1.gz
libblkfuse-dev usr/include/blkfuse-plugin.h
libblkfuse-dev usr/include/blkfuse.h
libblkfuse-dev usr/lib/libblkfuse.a
libblkfuse-dev usr/lib/libblkfuse.so
libblkfuse-dev usr/lib/pkgconfig/blkfuse.pc
libblkfuse-dev usr/share/man/man3/blkfuse-driver.3.gz
libblkfuse-dev usr/share/man/man3/blkfuse-plugin.3.gz
libblkfuse-dev usr/share/man/man3/blkfuse.3.gz
libblkfuse0 usr/lib/libblkfuse.so.0
libblkfuse0 usr/lib/libblkfuse.so.VERSION'
version=$(dpkg-parsechangelog -S Version)
present=$(for package in "${packages[@]}"; do
	dpkg-deb --fsys-tarfile "$debs/${package}_${version}_"*.deb | tar t |
		sed -n "/\/$/d; /\/share\/doc\//d; s|^\./|$package |p"
done | sed "s|/$(dpkg-architecture -qDEB_HOST_MULTIARCH)/|/|; s/\.so\.${version//./\\.}$/.so.VERSION/" | LC_ALL=C sort)
diff <(echo "$expected") <(echo "$present") || die "the packages do not have what they should"

dpkg -i "$debs"/*_"$version"_*.deb
files=$(dpkg -L "${packages[@]}" | grep blkfuse)

# A host that shows $work/disk: checks what is there, and ends it.
try() { # size, command...
	local size=$1
	shift
	: >"$work/disk"
	timeout 60 "$@" &
	host=$!
	for _ in $(seq 300); do
		[ "$(timeout 10 stat -c %s "$work/disk")" != "$size" ] || break
		kill -0 $host 2>/dev/null || die "$1 does not start"
		sleep 0.1
	done
	timeout 20 dd if=/dev/urandom of="$work/data" bs=64k count=4 status=none
	timeout 20 dd if="$work/data" of="$work/disk" bs=64k seek=3 conv=notrunc,fsync status=none
	timeout 20 dd if="$work/disk" bs=64k skip=3 count=4 status=none | cmp - "$work/data"
	kill $host
	wait $host || die "$1 ended with $?"
	host=
	[ "$(stat -c %s "$work/disk")" = 0 ] || die "$1 left its disk behind"
}

[ "$(blkfused --version)" = "blkfused $version" ] || die "blkfused is another one"
try $((1 << 20)) blkfused -w ram:1M "$work/disk"

ldconfig -p | grep libblkfuse.so.0 >/dev/null || die "the library is not in the loader's cache"
[ "$(pkg-config --modversion blkfuse)" = "$version" ] || die "pkg-config knows another version"
cc c-examples/ramdisk.c -o "$work/shared" $(pkg-config --cflags --libs blkfuse)
ldd "$work/shared" | grep 'libblkfuse.so.0 => /' >/dev/null || die "the program is not linked with the library"
try $((64 << 20)) "$work/shared" "$work/disk"
cc c-examples/ramdisk.c -o "$work/static" $(pkg-config --cflags blkfuse) \
	$(pkg-config --static --libs blkfuse | sed 's/-lblkfuse/-l:libblkfuse.a/')
! ldd "$work/static" | grep libblkfuse || die "the library is not linked statically"
try $((64 << 20)) "$work/static" "$work/disk"

# The programs need the library that it depends on.
! dpkg -r libblkfuse0 2>/dev/null || die "the library can be removed from below -dev"
dpkg -P "${packages[@]}"
for file in $files; do
	[ ! -e "$file" ] || die "$file is still there"
done
echo "debian: ${packages[*]} $version work"
