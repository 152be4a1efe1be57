//! The snapshot file: where it is, whether it may be used, and how it is replaced.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::snapshot_format::{Origin, Snapshot, decode, encode};
use crate::error::{ClusterError, in_range};
use crate::private_file;
use crate::view::Nodes;

/// The maximum length of a file. A hundred thousand nodes take 40 MiB.
const MAX_LENGTH: u64 = 4 << 30;

/// A file with the nodes that were seen last, so that a process that starts while the store is away
/// has backends to send requests to.
///
/// The file is written in the background after changes, and from time to time without changes,
/// because its age counts. It is written with mode 0600 as a new file in the same directory, which
/// then replaces the old file, so that it is always complete. It is read if the store cannot be
/// reached at the start. Whoever may write the file can redirect requests, so a file that others may
/// write is refused. So is a file that is damaged, too old, or of another group; a refused file is
/// left unchanged. The file never contains a leader.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SnapshotFile {
    /// The path of the file. Its directory must exist.
    #[serde(rename = "file")]
    pub path: PathBuf,
    /// The maximum age of a file that is used, in milliseconds. Default: 3,600,000 (an hour). Range:
    /// 1,000 to 31,536,000,000 (a year).
    #[serde(default = "default_max_age")]
    pub max_age_ms: u64,
    /// The minimum time between two writes, in milliseconds. Default: 10,000. Range: 100 to
    /// 3,600,000.
    #[serde(default = "default_interval")]
    pub interval_ms: u64,
}

fn default_max_age() -> u64 {
    3_600_000
}
fn default_interval() -> u64 {
    10_000
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl SnapshotFile {
    /// A file at this path, with the default settings.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            max_age_ms: default_max_age(),
            interval_ms: default_interval(),
        }
    }

    /// Sets the maximum age of a file that is used.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age_ms = millis(age);
        self
    }

    /// Sets the minimum time between two writes.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval_ms = millis(interval);
        self
    }

    /// Checks every field, and that the directory exists. Errors name the fields as parts of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) with the field.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        for (name, value, range) in [
            ("max_age_ms", self.max_age_ms, 1_000..=31_536_000_000),
            ("interval_ms", self.interval_ms, 100..=3_600_000),
        ] {
            in_range(field, name, value, range)?;
        }
        let path = self.path.display();
        let reason = if self.path.file_name().is_none() || self.path.is_dir() {
            format!("{path} does not name a file")
        } else if !private_file::directory(&self.path).is_dir() {
            format!("the directory of {path} does not exist")
        } else {
            return Ok(());
        };
        Err(ClusterError::config(format!("{field}.file"), reason))
    }

    /// Removes temporary files of processes that were killed while they wrote.
    pub(super) fn remove_abandoned(&self) {
        private_file::remove_abandoned(&self.path);
    }

    pub(super) fn error(&self, reason: impl ToString) -> ClusterError {
        ClusterError::SnapshotFile {
            path: self.path.display().to_string(),
            reason: reason.to_string(),
        }
    }

    /// Replaces the file. Blocks until it is on the disk.
    pub(super) fn write(
        &self,
        origin: &Origin,
        nodes: &Nodes,
        written: SystemTime,
    ) -> Result<(), ClusterError> {
        private_file::replace(&self.path, |file| encode(file, origin, written, nodes))
            .map_err(|error| self.error(error))
    }

    /// Reads the file, and checks that it may be used for this group now. Blocks.
    pub(super) fn read(&self, ours: &Origin, now: SystemTime) -> Result<Snapshot, ClusterError> {
        let bytes = private_file::read(&self.path, MAX_LENGTH);
        let bytes = bytes.map_err(|reason| self.error(reason))?;
        let snapshot = decode(&bytes).map_err(|reason| self.error(reason))?;
        check_origin(&snapshot.origin, ours)
            .and_then(|()| self.check_age(snapshot.written, now))
            .map_err(|reason| self.error(reason))?;
        Ok(snapshot)
    }

    fn check_age(&self, written: SystemTime, now: SystemTime) -> Result<(), String> {
        let most = Duration::from_millis(self.max_age_ms);
        match now.duration_since(written) {
            Ok(age) if age > most => Err(format!(
                "it is {} s old, at most {} s allowed",
                age.as_secs(),
                most.as_secs()
            )),
            Err(early) if early.duration() > most => Err(format!(
                "it was written {} s in the future",
                early.duration().as_secs()
            )),
            _ => Ok(()),
        }
    }
}

fn check_origin(theirs: &Origin, ours: &Origin) -> Result<(), String> {
    for (what, theirs, ours) in [
        ("group", &theirs.group, &ours.group),
        ("key prefix", &theirs.key_prefix, &ours.key_prefix),
        ("format", &theirs.format, &ours.format),
    ] {
        if theirs != ours {
            return Err(format!("it belongs to {what} {theirs:?}, not to {ours:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::snapshot_format::{seal, tests::GOOD};

    #[test]
    fn files_that_must_not_be_used_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nodes");
        let file = SnapshotFile::new(&path);
        file.validate("snapshot").unwrap();
        std::fs::write(&path, seal(GOOD.as_bytes())).unwrap();
        let written = std::time::UNIX_EPOCH + Duration::from_millis(1_700_000_000_000);
        let read = |group: &str, age: i64| {
            let now = written.checked_add(Duration::from_secs(age.max(0).unsigned_abs()));
            let now = now.unwrap() - Duration::from_secs(age.min(0).unsigned_abs());
            let ours = Origin {
                group: group.to_owned(),
                ..Origin::default()
            };
            file.read(&ours, now).map_err(|error| error.to_string())
        };
        assert_eq!(read("g", 3_600).unwrap().nodes.len(), 1);
        assert!(read("g", -60).is_ok());
        for (group, age, named) in [
            ("g", 3_602, "old"),
            ("h", 0, "group"),
            ("g", -4_000, "future"),
        ] {
            let error = read(group, age).unwrap_err();
            assert!(error.contains(named) && error.contains("nodes"), "{error}");
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
            assert!(read("g", 0).unwrap_err().contains("others may write"));
            // As Kubernetes makes it for the group of a pod.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
            assert!(read("g", 0).is_ok());
        }
        for (file, named) in [
            (SnapshotFile::new(directory.path()), "snapshot.file"),
            (SnapshotFile::new("/nowhere/at/all"), "snapshot.file"),
            (
                SnapshotFile::new(&path).max_age(Duration::ZERO),
                "snapshot.max_age_ms",
            ),
        ] {
            let error = file.validate("snapshot").unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
