//! Mountpoints: checking them, mounting a FUSE connection over them, and
//! undoing that.

/// Who may use the exported file besides its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AllowOther {
    /// Only the exporting user.
    Off,
    /// Everybody whom the file's mode allows; start fails if that is refused.
    On,
    /// Everybody if the system permits it, otherwise only the exporting user.
    #[default]
    Auto,
}
