//! What this machine can do for io_uring: read from /sys and /proc.

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use crate::error::Error;

const ENABLE_URING: &str = "sys/module/fuse/parameters/enable_uring";
const IO_URING_DISABLED: &str = "proc/sys/kernel/io_uring_disabled";
const OS_RELEASE: &str = "proc/sys/kernel/osrelease";
const POSSIBLE_CPUS: &str = "sys/devices/system/cpu/possible";
const ONLINE_CPUS: &str = "sys/devices/system/cpu/online";
/// In seconds; 0: no timeout.
const REQUEST_TIMEOUTS: [&str; 2] = ["default_request_timeout", "max_request_timeout"];

type Version = (u32, u32, u32);

/// Kernels whose FUSE over io_uring may use freed memory, leak pages, or leave
/// callers waiting (CVE-2026-64259, -64260, -64261, -64588 and others).
const DEFECTIVE: [RangeInclusive<Version>; 2] = [(6, 14, 0)..=(6, 18, 38), (6, 19, 0)..=(7, 1, 3)];

/// The system, as its files describe it.
#[derive(Debug)]
pub(crate) struct System {
    /// What holds `sys` and `proc`.
    root: PathBuf,
}

impl System {
    /// The one that this process runs on.
    pub(crate) fn new() -> Self {
        Self { root: "/".into() }
    }

    /// How many ring queues the kernel makes for a connection: one for every
    /// possible CPU, be it there or not. A ring with fewer is never ready.
    pub(crate) fn possible_cpus(&self) -> io::Result<usize> {
        self.cpus(POSSIBLE_CPUS, weight)
    }

    /// The CPUs that clients can run on now.
    pub(crate) fn online_cpus(&self) -> io::Result<Vec<usize>> {
        let numbers = |list: &str| Some(ranges(list)?.into_iter().flatten().collect());
        self.cpus(ONLINE_CPUS, numbers)
    }

    /// What `parse` makes of a list of CPUs.
    fn cpus<T>(&self, path: &str, parse: impl Fn(&str) -> Option<T>) -> io::Result<T> {
        let list = fs::read_to_string(self.root.join(path))?;
        parse(&list).ok_or_else(|| {
            let text = format!("/{path} is no list of CPUs: {list:?}");
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }

    /// Why io_uring cannot be used, and what to do about it. To be asked once
    /// /dev/fuse is open, which loads the module.
    pub(crate) fn obstacle(&self) -> Option<Error> {
        let enabled = self.read(ENABLE_URING);
        if enabled.is_none() {
            let text = format!(
                "the kernel has no FUSE over io_uring (there is no /{ENABLE_URING}); it needs \
                 Linux 6.14 or later, built with CONFIG_FUSE_IO_URING"
            );
            return Some(Error::new(libc::EOPNOTSUPP, text));
        }
        if enabled.as_deref() != Some("Y") {
            let text = format!(
                "FUSE over io_uring is switched off; as root, before the export starts: \
                 echo Y > /{ENABLE_URING}"
            );
            return Some(Error::new(libc::EOPNOTSUPP, text));
        }
        // 1 leaves it to privileged processes and a group; whether this is one
        // shows when the ring is made.
        if self.read(IO_URING_DISABLED).as_deref() == Some("2") {
            let text = "io_uring is disabled for all processes; as root, before the export \
                        starts: sysctl kernel.io_uring_disabled=0";
            return Some(Error::new(libc::EPERM, text));
        }
        None
    }

    /// Why io_uring, though it could be used, had better not be unless it was
    /// asked for.
    pub(crate) fn doubt(&self) -> Option<String> {
        let release = self.read(OS_RELEASE).unwrap_or_default();
        if has_known_defects(&release) {
            return Some(format!(
                "Linux {release} has known defects in FUSE over io_uring, which 6.18.39 and \
                 7.1.4 do not have"
            ));
        }
        REQUEST_TIMEOUTS.iter().find_map(|name| {
            let seconds = self.read(&format!("proc/sys/fs/fuse/{name}"))?;
            (seconds != "0").then(|| {
                format!(
                    "fs.fuse.{name} is {seconds}: the kernel would end a connection with a \
                     request that takes more seconds"
                )
            })
        })
    }

    /// A file's only line; `None` without the file.
    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }
}

/// The ranges of a list like "0-3,8"; `None` if it is no such list.
fn ranges(list: &str) -> Option<Vec<RangeInclusive<usize>>> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        (first <= last).then_some(first..=last)
    };
    list.trim().split(',').map(range).collect()
}

/// How many CPUs such a list has.
fn weight(list: &str) -> Option<usize> {
    let ranges = ranges(list)?;
    ranges.iter().try_fold(0usize, |sum, range| {
        sum.checked_add(range.end().checked_sub(*range.start())?.checked_add(1)?)
    })
}

/// Whether that kernel's FUSE over io_uring is known to be unsafe, as far as
/// its version tells.
fn has_known_defects(release: &str) -> bool {
    version(release).is_some_and(|v| DEFECTIVE.iter().any(|range| range.contains(&v)))
}

/// The numbers at the beginning of a kernel's release, such as 6.18.44-fc.
fn version(release: &str) -> Option<Version> {
    let end = release.find(|c: char| c != '.' && !c.is_ascii_digit());
    let mut numbers = release[..end.unwrap_or(release.len())].split('.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    let patch = numbers.next().map_or(Some(0), |n| n.parse().ok())?;
    Some((major, minor, patch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A system made of files, which can do everything.
    struct Made {
        dir: TempDir,
        system: System,
    }

    impl Made {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let system = System {
                root: dir.path().into(),
            };
            let made = Self { dir, system };
            made.put(ENABLE_URING, "Y\n");
            made.put(IO_URING_DISABLED, "0\n");
            made.put(OS_RELEASE, "6.18.44-fc-v657\n");
            made.put(POSSIBLE_CPUS, "0-1\n");
            made.put("proc/sys/fs/fuse/default_request_timeout", "0\n");
            made.put("proc/sys/fs/fuse/max_request_timeout", "0\n");
            made
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn remove(&self, path: &str) {
            fs::remove_file(self.dir.path().join(path)).unwrap();
        }

        fn obstacle(&self) -> String {
            self.system.obstacle().unwrap().message().to_owned()
        }
    }

    #[test]
    fn the_possible_cpus_are_counted() {
        for (list, count) in [
            ("0\n", 1),
            ("0-1\n", 2),
            ("0-3,8\n", 5),
            ("0-255", 256),
            ("1,3,5-5", 3),
        ] {
            assert_eq!(weight(list), Some(count), "{list}");
        }
        for nonsense in [
            "",
            "\n",
            "-",
            "0-",
            "3-1",
            "0,",
            "a",
            "0-1-2",
            "0 1",
            "0-99999999999999999999",
            "0-18446744073709551615",
        ] {
            assert_eq!(weight(nonsense), None, "{nonsense}");
        }
        let made = Made::new();
        assert_eq!(made.system.possible_cpus().unwrap(), 2);
        made.put(POSSIBLE_CPUS, "none\n");
        let error = made.system.possible_cpus().unwrap_err();
        assert!(error.to_string().contains("cpu/possible is no list"));
        made.remove(POSSIBLE_CPUS);
        let error = made.system.possible_cpus().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_cpus_that_are_there_are_listed() {
        let made = Made::new();
        made.put(ONLINE_CPUS, "0-2,5\n");
        assert_eq!(made.system.online_cpus().unwrap(), [0, 1, 2, 5]);
        made.put(ONLINE_CPUS, "2-1\n");
        assert!(made.system.online_cpus().is_err());
    }

    #[test]
    fn this_machine_has_a_cpu() {
        let possible = System::new().possible_cpus().unwrap();
        assert!(possible >= std::thread::available_parallelism().unwrap().get());
    }

    #[test]
    fn a_system_that_can_has_no_obstacle_and_no_doubt() {
        let made = Made::new();
        assert_eq!(made.system.obstacle(), None);
        assert_eq!(made.system.doubt(), None);
        // Older kernels cannot disable it, nor end slow requests.
        made.remove(IO_URING_DISABLED);
        made.remove("proc/sys/fs/fuse/default_request_timeout");
        made.remove("proc/sys/fs/fuse/max_request_timeout");
        assert_eq!(made.system.obstacle(), None);
        assert_eq!(made.system.doubt(), None);
    }

    #[test]
    fn every_obstacle_is_named_with_the_remedy() {
        let made = Made::new();
        // Some processes may.
        made.put(IO_URING_DISABLED, "1\n");
        assert_eq!(made.system.obstacle(), None);
        made.put(IO_URING_DISABLED, "2\n");
        assert_eq!(made.system.obstacle().unwrap().errno(), libc::EPERM);
        assert!(
            made.obstacle()
                .ends_with("sysctl kernel.io_uring_disabled=0")
        );
        made.put(ENABLE_URING, "N\n");
        assert_eq!(made.system.obstacle().unwrap().errno(), libc::EOPNOTSUPP);
        assert!(
            made.obstacle()
                .ends_with("echo Y > /sys/module/fuse/parameters/enable_uring")
        );
        made.remove(ENABLE_URING);
        assert_eq!(made.system.obstacle().unwrap().errno(), libc::EOPNOTSUPP);
        assert!(made.obstacle().contains("CONFIG_FUSE_IO_URING"));
    }

    #[test]
    fn the_kernel_and_the_administrator_can_give_reasons_for_doubt() {
        let made = Made::new();
        made.put("proc/sys/fs/fuse/max_request_timeout", "60\n");
        let doubt = made.system.doubt().unwrap();
        assert!(
            doubt.starts_with("fs.fuse.max_request_timeout is 60: "),
            "{doubt}"
        );
        made.put("proc/sys/fs/fuse/default_request_timeout", "30\n");
        let doubt = made.system.doubt().unwrap();
        assert!(
            doubt.starts_with("fs.fuse.default_request_timeout is 30: "),
            "{doubt}"
        );
        made.put(OS_RELEASE, "6.18.38\n");
        let doubt = made.system.doubt().unwrap();
        assert!(
            doubt.starts_with("Linux 6.18.38 has known defects"),
            "{doubt}"
        );
    }

    #[test]
    fn defects_are_known_by_the_version() {
        for release in [
            "6.14",
            "6.14.0",
            "6.17.0-14-generic",
            "6.18",
            "6.18.38",
            "6.18.38-rc1",
            "6.19.0-rc1",
            "6.19.12",
            "7.0.1",
            "7.1",
            "7.1.3",
            "7.1.0-1.fc45.x86_64",
        ] {
            assert!(has_known_defects(release), "{release}");
        }
        for release in [
            "6.12.50",
            "6.13.7",
            "6.18.39",
            "6.18.44-fc-v657",
            "6.18.100",
            "7.1.4",
            "7.1.10",
            "7.2",
            "7.2.0-rc1",
            "8.0",
            "",
            "six",
            "6",
            "-6.15",
            "6.15.99999999999",
            ".6.15",
            "6..15",
        ] {
            assert!(!has_known_defects(release), "{release}");
        }
    }
}
