//! What people do with a disk image: copy it, convert it, make and mount file
//! systems in it, keep a database in it.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::client::{command, have, run};
use common::sparse::{BLOCK, Exported, Sparse};
use common::{Memory, Mounted, for_queues, pattern, skip};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

/// False, said, and a failure in CI, if one of the programs is missing.
fn have_all(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|p| !have(p));
    if let Some(program) = missing {
        skip(&format!("no {program}"));
    }
    missing.is_none()
}

fn scratch(name: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    (dir, path)
}

#[test]
fn cat_and_cp_read_all_of_it() {
    for_queues(|queues| {
        let m = Mounted::fixed(3_000_001, queues);
        assert!(run(&mut command("cat {}", &m.path)).stdout == pattern(0, 3_000_001));
        let (_dir, copy) = scratch("copy");
        for option in ["--sparse=auto", "--sparse=always", "--reflink=auto"] {
            run(Command::new("cp").args([option.as_ref(), m.path.as_path(), &copy]));
            assert!(fs::read(&copy).unwrap() == pattern(0, 3_000_001));
        }
        run(Command::new("cmp").args([&m.path, &copy]));
    });
}

#[test]
fn cp_keeps_the_holes_of_a_sparse_image() {
    use std::os::unix::fs::MetadataExt;
    for_queues(|queues| {
        let sparse = Sparse::new(1 << 30);
        for block in [0, 5, 70_000, (1 << 30) / BLOCK - 1] {
            sparse.put_block(block, 7);
        }
        let e = Exported::with(sparse.clone(), queues, |b| b);
        let (_dir, copy) = scratch("copy");
        run(Command::new("cp").args([&e.path, &copy]));
        let meta = fs::metadata(&copy).unwrap();
        assert_eq!(meta.len(), 1 << 30);
        assert!(meta.blocks() < 10_000, "{} blocks", meta.blocks());
        run(Command::new("cmp").args([&e.path, &copy]));

        // And into an export that grows.
        let target = Sparse::new(0);
        let t = Exported::with(target.clone(), queues, |b| b.growable(true));
        run(Command::new("cp")
            .arg("--sparse=always")
            .args([&copy, &t.path]));
        assert_eq!(target.length(), 1 << 30);
        assert!(target.has_block(5) && target.has_block(70_000));
        assert!(!target.has_block(6) && !target.has_block(100_000));
    });
}

#[test]
fn cp_and_the_shell_write_into_it() {
    for_queues(|queues| {
        let (_dir, source) = scratch("source");
        let data = pattern(99, 2_500_001);
        fs::write(&source, &data).unwrap();
        let m = Mounted::growable(3_000_000, queues);
        run(Command::new("cp").args([&source, &m.path]));
        assert!(m.driver.bytes() == data);
        let sh = "echo more >> $0; echo even more >> $0";
        run(Command::new("sh").args(["-c", sh]).arg(&m.path));
        assert_eq!(&m.driver.bytes()[2_500_001..], b"more\neven more\n");

        // A fixed size is that of a disk: what is longer fails.
        let m = Mounted::fixed(2_500_001, queues);
        run(Command::new("cp").args([&source, &m.path]));
        assert!(m.driver.bytes() == data);
        let m = Mounted::fixed(2_500_000, queues);
        let cp = Command::new("cp")
            .args([&source, &m.path])
            .output()
            .unwrap();
        assert!(!cp.status.success());
        assert!(String::from_utf8_lossy(&cp.stderr).contains("No space left"));
    });
}

#[test]
fn dd_in_every_way() {
    for_queues(|queues| {
        let m = Mounted::fixed(4 << 20, queues);
        let read =
            |options: &str| run(&mut command(&format!("dd if={{}} {options}"), &m.path)).stdout;
        let all = pattern(0, 4 << 20);
        assert!(read("bs=1M") == all);
        assert!(read("bs=4k iflag=direct") == all);
        assert!(read("bs=1000003") == all);
        assert!(read("bs=512 skip=3 count=5") == all[1536..][..2560]);

        let (_dir, source) = scratch("source");
        let data = pattern(5, 3 << 20);
        fs::write(&source, &data).unwrap();
        for options in [
            "bs=64k conv=notrunc,fsync",
            "bs=1M oflag=direct conv=notrunc",
            "bs=7001 conv=notrunc,fdatasync",
            "bs=256k oflag=sync conv=notrunc",
            "bs=256k oflag=dsync",
        ] {
            m.driver.set_bytes(all.clone());
            let mut dd = command(&format!("dd of={{}} {options}"), &m.path);
            run(dd.stdin(Stdio::from(fs::File::open(&source).unwrap())));
            let bytes = m.driver.bytes();
            assert!(bytes[..3 << 20] == data, "{options}");
            assert!(bytes[3 << 20..] == all[3 << 20..], "{options}");
        }
        // conv=sparse seeks over zeroes; a disk full of zeroes is one error.
        let full = command("dd if=/dev/zero of={} bs=1M conv=notrunc", &m.path)
            .output()
            .unwrap();
        assert!(!full.status.success());
        assert!(m.driver.bytes() == vec![0; 4 << 20]);
    });
}

#[test]
fn qemu_img_converts_from_it_and_into_it() {
    if !have_all(&["qemu-img"]) {
        return;
    }
    for_queues(|queues| {
        let mut data = pattern(1, 8 << 20);
        data[1 << 20..5 << 20].fill(0);
        let m = Mounted::with(Memory::new(data.clone()), queues, |b| b);
        let (_dir, qcow2) = scratch("copy.qcow2");
        let copy = qcow2.to_str().unwrap();
        for cache in ["none", "writeback"] {
            let convert = format!("qemu-img convert -T {cache} -f raw -O qcow2 {{}} {copy}");
            run(&mut command(&convert, &m.path));
            let compare = format!("qemu-img compare -f raw -F qcow2 {{}} {copy}");
            run(&mut command(&compare, &m.path));
        }
        // Onto a disk that is there, and into a file that is made longer.
        let fixed = Mounted::fixed(8 << 20, queues);
        let convert = format!("qemu-img convert -n -t none -f qcow2 -O raw {copy} {{}}");
        run(&mut command(&convert, &fixed.path));
        assert!(fixed.driver.bytes() == data);
        let growable = Mounted::growable(0, queues);
        let convert = format!("qemu-img convert -f qcow2 -O raw {copy} {{}}");
        run(&mut command(&convert, &growable.path));
        assert!(growable.driver.bytes() == data);
        // As a qcow2 file's container.
        let container = Mounted::growable(0, queues);
        let convert = format!("qemu-img convert -f qcow2 -O qcow2 {copy} {{}}");
        run(&mut command(&convert, &container.path));
        let compare = format!("qemu-img compare -f qcow2 -F qcow2 {copy} {{}}");
        run(&mut command(&compare, &container.path));
        run(&mut command("qemu-img check -f qcow2 {}", &container.path));
    });
}

#[test]
fn qemu_io_writes_zeroes_discards_and_reads_back() {
    if !have_all(&["qemu-io"]) {
        return;
    }
    for_queues(|queues| {
        for (cache, aio) in [
            ("none", "native"),
            ("none", "io_uring"),
            ("writeback", "threads"),
        ] {
            let m = Mounted::fixed(8 << 20, queues);
            let output = run(Command::new("qemu-io")
                .args(["-f", "raw", "-t", cache, "-i", aio, "-d", "unmap"])
                .args(["-c", "write -P 0x11 0 1M"])
                .args(["-c", "aio_write -P 0x22 1M 3M"])
                .args(["-c", "aio_write -P 0x33 4M 64k"])
                .args(["-c", "aio_flush"])
                .args(["-c", "write -z 512k 64k"])
                .args(["-c", "write -z -u 2M 64k"])
                .args(["-c", "discard 3M 64k"])
                .args(["-c", "flush"])
                .args(["-c", "read -P 0x11 0 512k"])
                .args(["-c", "read -P 0 512k 64k"])
                .args(["-c", "read -P 0x22 1M 1M"])
                .args(["-c", "read -P 0 2M 64k"])
                .args(["-c", "read -P 0 3M 64k"])
                .args(["-c", "read -P 0x33 4M 64k"])
                .arg(&m.path));
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(!said.contains("failed"), "{cache}, {aio}: {said}");
            let bytes = m.driver.bytes();
            assert!(bytes[..512 << 10].iter().all(|b| *b == 0x11));
            assert!(bytes[3 << 20..][..64 << 10].iter().all(|b| *b == 0));
            let rest = (4 << 20) + (64 << 10);
            assert!(bytes[rest..] == pattern(rest, (8 << 20) - rest));
        }
    });
}

#[test]
fn mkfs_and_fsck_work_on_the_file() {
    if !have_all(&["mkfs.ext4", "fsck.ext4"]) {
        return;
    }
    for_queues(|queues| {
        let sparse = Sparse::new(512 << 20);
        let e = Exported::with(sparse, queues, |b| b);
        run(&mut command("mkfs.ext4 -q -F {}", &e.path));
        run(&mut command("fsck.ext4 -f -n {}", &e.path));
    });
}

/// A loop device; detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn attach(path: &Path, direct: bool) -> Option<Self> {
        let direct = format!("--direct-io={}", if direct { "on" } else { "off" });
        let output = Command::new("losetup")
            .args(["--find", "--show", &direct])
            .arg(path)
            .output()
            .ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.0).status();
        let detached = detached.is_ok_and(|s| s.success());
        assert!(detached || std::thread::panicking(), "losetup -d failed");
    }
}

/// A mount of a loop device; undone when dropped.
struct OnLoop(PathBuf);

impl Drop for OnLoop {
    fn drop(&mut self) {
        let undone =
            umount2(&self.0, MntFlags::empty()).or_else(|_| umount2(&self.0, MntFlags::MNT_DETACH));
        assert!(undone.is_ok() || std::thread::panicking(), "{undone:?}");
    }
}

#[test]
fn a_file_system_on_a_loop_device_over_the_file() {
    if !have_all(&["losetup", "mkfs.ext4", "fsck.ext4", "fstrim"]) {
        return;
    }
    for_queues(|queues| {
        for direct in [false, true] {
            let sparse = Sparse::new(128 << 20);
            let e = Exported::with(sparse.clone(), queues, |b| b);
            run(&mut command("mkfs.ext4 -q -F -O ^has_journal {}", &e.path));
            let data = pattern(3, 5_000_001);
            {
                let Some(device) = Loop::attach(&e.path, direct) else {
                    return skip("no loop device can be attached");
                };
                let dir = tempfile::tempdir().unwrap();
                run(Command::new("mount")
                    .args(["-t", "ext4"])
                    .args([&device.0, dir.path()]));
                let mount = OnLoop(dir.path().to_owned());
                fs::write(dir.path().join("file"), &data).unwrap();
                for i in 0..50 {
                    fs::write(dir.path().join(format!("small{i}")), [i; 3000]).unwrap();
                }
                let file = fs::File::open(dir.path().join("file")).unwrap();
                file.sync_all().unwrap();
                drop(file);
                // Discards arrive as punched holes.
                fs::write(dir.path().join("gone"), vec![9; 8 << 20]).unwrap();
                nix::unistd::sync();
                fs::remove_file(dir.path().join("gone")).unwrap();
                run(Command::new("fstrim").arg(dir.path()));
                drop(mount);
                run(Command::new("mount")
                    .args(["-t", "ext4", "-o", "ro"])
                    .args([&device.0, dir.path()]));
                let _mount = OnLoop(dir.path().to_owned());
                assert!(fs::read(dir.path().join("file")).unwrap() == data);
                for i in 0..50 {
                    let small = fs::read(dir.path().join(format!("small{i}"))).unwrap();
                    assert!(small == [i; 3000]);
                }
            }
            run(&mut command("fsck.ext4 -f -n {}", &e.path));
        }
    });
}

#[test]
fn sqlite_keeps_a_database_in_it() {
    if !have_all(&["sqlite3"]) {
        return;
    }
    let sqlite = |path: &Path, script: &str| {
        let mut child = Command::new("sqlite3")
            .arg("-bail")
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(script.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    for_queues(|queues| {
        for journal in ["delete", "wal"] {
            // The file is the database; its journal lies beside it.
            let m = Mounted::growable(0, queues);
            sqlite(
                &m.path,
                &format!(
                    "pragma journal_mode={journal}; pragma mmap_size=1000000; \
                     create table t(id integer primary key, text); \
                     with recursive n(i) as (select 1 union all select i + 1 from n where i < 5000) \
                     insert into t select i, hex(randomblob(50)) from n;"
                ),
            );
            for i in 0..20 {
                sqlite(
                    &m.path,
                    &format!("insert into t(text) values ('more {i}');"),
                );
            }
            let rolled_back = "begin; delete from t; rollback; select count(*) from t;";
            assert_eq!(sqlite(&m.path, rolled_back), "5020\n");
            assert_eq!(sqlite(&m.path, "pragma integrity_check;"), "ok\n");
            sqlite(&m.path, "delete from t where id > 100; vacuum;");
            let shrunk = "select count(*) from t; pragma integrity_check;";
            assert_eq!(sqlite(&m.path, shrunk), "100\nok\n");
        }
    });
}

#[test]
fn the_kernel_copies_within_and_out_of_it() {
    for_queues(|queues| {
        let m = Mounted::fixed(3_000_001, queues);
        let (_dir, copy) = scratch("copy");
        let mut target = fs::File::create(&copy).unwrap();
        // copy_file_range, sendfile or splice, whatever works.
        let copied = std::io::copy(&mut m.open(false), &mut target).unwrap();
        assert_eq!(copied, 3_000_001);
        assert!(fs::read(&copy).unwrap() == pattern(0, 3_000_001));
        let mut source = fs::File::open(&copy).unwrap();
        m.driver.set_bytes(vec![0; 3_000_001]);
        std::io::copy(&mut source, &mut m.open(true)).unwrap();
        assert!(m.driver.bytes() == pattern(0, 3_000_001));
    });
}
