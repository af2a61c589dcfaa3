//! The paths that this process exports.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::mountinfo::MountId;

static EXPORTS: Mutex<Vec<Export>> = Mutex::new(Vec::new());

#[derive(Debug)]
struct Export {
    path: PathBuf,
    presence: Presence,
}

/// What is known about an export's mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Presence {
    /// Not there yet, or no longer.
    Absent,
    Mounted(MountId),
    /// Mounted, but /proc could not say as what.
    Unidentified,
}

/// The exclusive right of one export to a path, within this process.
#[derive(Debug)]
pub(super) struct Claim {
    // Unique among the exports, and so their key.
    path: PathBuf,
}

impl Claim {
    /// Claims `path`, which lies on the mount `on`. `None` if an export has it,
    /// or has it under the name that it had before a directory was renamed.
    pub(super) fn new(path: PathBuf, on: Option<&MountId>) -> Option<Self> {
        let is_taken = |export: &Export| {
            let on_its_mount = match (&export.presence, on) {
                (Presence::Mounted(id), Some(on)) => id.same_mount(on),
                _ => false,
            };
            export.path == path || on_its_mount
        };
        let mut exports = EXPORTS.lock();
        if exports.iter().any(is_taken) {
            return None;
        }
        exports.push(Export {
            path: path.clone(),
            presence: Presence::Absent,
        });
        Some(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Records the mount that now belongs to the claim.
    pub(super) fn set(&self, presence: Presence) {
        let mut exports = EXPORTS.lock();
        for export in exports.iter_mut() {
            if export.path == self.path {
                export.presence = presence.clone();
            } else if let (Presence::Mounted(old), Presence::Mounted(new)) =
                (&export.presence, &presence)
                && old.id == new.id
            {
                // The kernel reuses ids: whoever had this one has been
                // unmounted from outside, and must not take down its successor.
                export.presence = Presence::Absent;
            }
        }
    }

    /// The mount that belongs to the claim.
    pub(super) fn presence(&self) -> Presence {
        let exports = EXPORTS.lock();
        let export = exports.iter().find(|export| export.path == self.path);
        export.map_or(Presence::Absent, |export| export.presence.clone())
    }

    /// Takes the mount away, leaving none.
    pub(super) fn take(&self) -> Presence {
        let mut exports = EXPORTS.lock();
        match exports.iter_mut().find(|export| export.path == self.path) {
            Some(export) => std::mem::replace(&mut export.presence, Presence::Absent),
            None => Presence::Absent,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        EXPORTS.lock().retain(|export| export.path != self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: u64) -> MountId {
        MountId {
            id,
            ..MountId::default()
        }
    }

    #[test]
    fn a_path_has_one_owner_until_it_is_dropped() {
        let path = PathBuf::from("/registry/one");
        let claim = Claim::new(path.clone(), None).unwrap();
        assert!(Claim::new(path.clone(), None).is_none());
        drop(claim);
        assert!(Claim::new(path, None).is_some());
    }

    #[test]
    fn only_one_of_many_concurrent_claims_wins() {
        let winners: Vec<Claim> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Claim::new("/registry/race".into(), None)))
                .collect();
            threads
                .into_iter()
                .filter_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(winners.len(), 1);
    }

    #[test]
    fn a_mount_is_recognised_under_a_new_name() {
        let claim = Claim::new("/registry/old/file".into(), None).unwrap();
        claim.set(Presence::Mounted(id(u64::MAX)));
        assert!(Claim::new("/registry/new/file".into(), Some(&id(u64::MAX))).is_none());
        assert!(Claim::new("/registry/new/file".into(), Some(&id(1))).is_some());
    }

    #[test]
    fn a_reused_id_belongs_to_the_later_mount() {
        let first = Claim::new("/registry/first".into(), None).unwrap();
        let second = Claim::new("/registry/second".into(), None).unwrap();
        first.set(Presence::Mounted(id(u64::MAX - 1)));
        second.set(Presence::Mounted(id(u64::MAX - 1)));
        assert_eq!(first.take(), Presence::Absent);
        assert_eq!(second.take(), Presence::Mounted(id(u64::MAX - 1)));
        assert_eq!(second.take(), Presence::Absent);
    }
}
