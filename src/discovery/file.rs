//! The nodes on disk, for a start without the store.
//!
//! A line that names the format and its version, one object of JSON, and a line with its checksum.
//! Replaced as a whole: what is there is complete, whenever the process or the machine ends.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info, warn};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::error::{ClusterError, in_range};
use crate::node::Node;
use crate::store::Revision;
use crate::view::Nodes;

const FORMAT: &str = "pingora-etcd snapshot 1\n";
const FORMAT_NAME: &str = "pingora-etcd snapshot ";
/// Length of the last line: a line feed, the checksum, a line feed.
const TRAILER: usize = 18;
/// How the names of files end that are being written.
const TEMPORARY: &str = ".tmp";
/// Nothing takes so long to write.
const ABANDONED: Duration = Duration::from_secs(600);
/// A file longer than this is none of ours: a hundred thousand nodes take 40 MiB.
const LONGEST: u64 = 4 << 30;

/// A file that holds the nodes last seen, so that a process that starts while the store is away
/// has somewhere to send requests.
///
/// Written in the background (mode 0600, by a new file in the same directory that takes the place of
/// the old one) after changes, and now and then without any, because its age counts; read when the
/// store cannot be reached at the start. Who may write it can send requests anywhere, so a file that
/// others may write is refused, as is one that is damaged, of another group, or too old; it is left
/// where it is. It never tells of a leader.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct SnapshotFile {
    /// The file. Its directory has to be there.
    #[serde(rename = "file")]
    pub path: PathBuf,
    /// How old it may be to be used, in milliseconds. Default: 3,600,000 (an hour). Range: 1,000 to
    /// 31,536,000,000 (a year).
    #[serde(default = "default_max_age")]
    pub max_age_ms: u64,
    /// The least time between two writes, in milliseconds. Default: 10,000. Range: 100 to 3,600,000.
    #[serde(default = "default_interval")]
    pub interval_ms: u64,
}

fn default_max_age() -> u64 {
    3_600_000
}
fn default_interval() -> u64 {
    10_000
}

impl SnapshotFile {
    /// This file, and every default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            max_age_ms: default_max_age(),
            interval_ms: default_interval(),
        }
    }

    /// Sets how old it may be to be used.
    #[must_use]
    pub fn max_age(mut self, age: Duration) -> Self {
        self.max_age_ms = millis(age);
        self
    }

    /// Sets the least time between two writes.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval_ms = millis(interval);
        self
    }

    /// Checks every field, which is named as under `field`, and that the directory is there.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field.
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
        } else if !self.directory().is_dir() {
            format!("the directory of {path} does not exist")
        } else {
            return Ok(());
        };
        Err(ClusterError::config(format!("{field}.file"), reason))
    }

    fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        }
    }

    fn temporary_prefix(&self) -> String {
        let name = self.path.file_name().unwrap_or_default();
        format!(".{}.", name.to_string_lossy())
    }

    /// Removes what writes have left behind that were killed a while ago.
    fn tidy(&self) {
        let prefix = self.temporary_prefix();
        let Ok(entries) = std::fs::read_dir(self.directory()) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let is_old = || {
                let modified = entry.metadata().and_then(|about| about.modified());
                modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED))
            };
            if name.starts_with(&prefix) && name.ends_with(TEMPORARY) && is_old() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    fn error(&self, reason: impl ToString) -> ClusterError {
        ClusterError::SnapshotFile {
            path: self.path.display().to_string(),
            reason: reason.to_string(),
        }
    }

    fn write(&self, of: &About, nodes: &Nodes, written: SystemTime) -> Result<(), ClusterError> {
        let prefix = self.temporary_prefix();
        let file = tempfile::Builder::new()
            .prefix(&prefix)
            .suffix(TEMPORARY)
            .tempfile_in(self.directory());
        let mut file = file.map_err(|error| self.error(error))?;
        let written = written.duration_since(UNIX_EPOCH).map_or(0, millis);
        let nodes = nodes.iter().map(|node| Stored {
            incarnation: node.incarnation(),
            node: &**node,
        });
        let contents = Contents {
            group: &of.group,
            key_prefix: &of.key_prefix,
            cluster_id: of.cluster_id,
            revision: of.revision,
            written,
            nodes: nodes.collect(),
        };
        let write = |file: &mut File| -> std::io::Result<()> {
            let mut out = Summing {
                inner: BufWriter::new(file),
                sum: Xxh3::new(),
            };
            out.inner.write_all(FORMAT.as_bytes())?;
            serde_json::to_writer(&mut out, &contents)?;
            let sum = out.sum.digest();
            write!(out.inner, "\n{sum:016x}\n")?;
            out.inner.flush()
        };
        write(file.as_file_mut()).map_err(|error| self.error(error))?;
        file.as_file()
            .sync_all()
            .map_err(|error| self.error(error))?;
        file.persist(&self.path)
            .map_err(|error| self.error(error.error))?;
        // So that the new name survives too.
        let directory = File::open(self.directory()).and_then(|directory| directory.sync_all());
        directory.map_err(|error| self.error(error))
    }

    /// Reads the file, if it is of this group and can be used now.
    pub(crate) fn read(
        &self,
        group: &str,
        key_prefix: &str,
        now: SystemTime,
    ) -> Result<Loaded, ClusterError> {
        let mut file = File::open(&self.path).map_err(|error| self.error(error))?;
        let about = file.metadata().map_err(|error| self.error(error))?;
        check_mode(&about).map_err(|reason| self.error(reason))?;
        if about.len() > LONGEST {
            return Err(self.error(format!("{} bytes is too long", about.len())));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(|error| self.error(error))?;
        let loaded = decode(&bytes).map_err(|reason| self.error(reason))?;
        for (what, theirs, ours) in [
            ("group", &*loaded.group, group),
            ("key prefix", &*loaded.key_prefix, key_prefix),
        ] {
            if theirs != ours {
                return Err(self.error(format!("it is of {what} {theirs:?}, not of {ours:?}")));
            }
        }
        let most = Duration::from_millis(self.max_age_ms);
        match now.duration_since(loaded.written) {
            Ok(age) if age > most => Err(self.error(format!(
                "it is {} s old, at most {} s allowed",
                age.as_secs(),
                most.as_secs()
            ))),
            Err(early) if early.duration() > most => Err(self.error(format!(
                "it was written {} s in the future",
                early.duration().as_secs()
            ))),
            _ => Ok(loaded),
        }
    }
}

#[cfg(unix)]
fn check_mode(about: &std::fs::Metadata) -> Result<(), String> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let (mode, owner) = (about.permissions().mode() & 0o777, about.uid());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(format!("it belongs to another user (uid {owner})"));
    }
    if mode & 0o022 != 0 {
        return Err(format!("others may write it (mode {mode:04o})"));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_mode(_: &std::fs::Metadata) -> Result<(), String> {
    Ok(())
}

/// What is in a file.
#[derive(Debug)]
pub(crate) struct Loaded {
    group: String,
    key_prefix: String,
    pub(crate) cluster_id: u64,
    pub(crate) revision: Revision,
    pub(crate) written: SystemTime,
    pub(crate) nodes: Vec<Node>,
}

/// Understands a file, or says why not. Whatever the bytes are.
pub(crate) fn decode(bytes: &[u8]) -> Result<Loaded, String> {
    let Some(rest) = bytes.strip_prefix(FORMAT.as_bytes()) else {
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or(bytes);
        let other = std::str::from_utf8(line).ok();
        return Err(
            match other.and_then(|line| line.strip_prefix(FORMAT_NAME)) {
                Some(version) if line.len() < 40 => {
                    format!("it is of format version {version:?}, this is 1")
                }
                _ => "it is no snapshot of nodes".to_owned(),
            },
        );
    };
    let damaged = || "it is damaged: its checksum is not that of its contents".to_owned();
    let end = rest.len().checked_sub(TRAILER).ok_or_else(damaged)?;
    let (json, trailer) = rest.split_at(end);
    if trailer != format!("\n{:016x}\n", xxh3_64(json)).as_bytes() {
        return Err(damaged());
    }
    let contents: Contents<String, Node> = serde_json::from_slice(json)
        .map_err(|error| format!("it cannot be understood: {error}"))?;
    let written = UNIX_EPOCH.checked_add(Duration::from_millis(contents.written));
    Ok(Loaded {
        group: contents.group,
        key_prefix: contents.key_prefix,
        cluster_id: contents.cluster_id,
        revision: contents.revision,
        written: written.ok_or("its time is out of range")?,
        nodes: contents
            .nodes
            .into_iter()
            .map(|stored| stored.node.with_incarnation(stored.incarnation))
            .collect(),
    })
}

/// These contents as a file, whatever they are.
#[cfg(any(test, feature = "test-util"))]
pub(crate) fn seal(json: &[u8]) -> Vec<u8> {
    let trailer = format!("\n{:016x}\n", xxh3_64(json));
    [FORMAT.as_bytes(), json, trailer.as_bytes()].concat()
}

#[derive(Serialize, Deserialize)]
struct Contents<Text, Entry> {
    group: Text,
    key_prefix: Text,
    cluster_id: u64,
    revision: Revision,
    /// Unix time in milliseconds.
    written: u64,
    nodes: Vec<Stored<Entry>>,
}

#[derive(Serialize, Deserialize)]
struct Stored<Entry> {
    incarnation: i64,
    node: Entry,
}

struct Summing<W> {
    inner: W,
    sum: Xxh3,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sum.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What a file is of, beside its nodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct About {
    pub(crate) group: String,
    pub(crate) key_prefix: String,
    pub(crate) cluster_id: u64,
    pub(crate) revision: Revision,
}

/// Writes the file when it is time, one write at a time and on a thread for blocking work.
#[derive(Debug)]
pub(crate) struct Saver {
    file: SnapshotFile,
    about: About,
    job: Option<JoinHandle<Result<(), ClusterError>>>,
    /// Since when the first write is due. A time that lies in the past by the time that it is compared
    /// with another: a deadline made up anew for each comparison would never have come.
    created: Instant,
    last: Option<Instant>,
    /// Something has changed since, or the last write has failed.
    dirty: bool,
    failing: bool,
}

impl Saver {
    pub(crate) fn new(file: SnapshotFile, about: About) -> Self {
        Self {
            file,
            about,
            job: None,
            created: Instant::now(),
            last: None,
            dirty: false,
            failing: false,
        }
    }

    pub(crate) fn changed(&mut self) {
        self.dirty = true;
    }

    /// When to write next, while the store is heard.
    pub(crate) fn due(&self) -> Option<Instant> {
        if self.job.is_some() {
            return None;
        }
        let interval = Duration::from_millis(self.file.interval_ms);
        Some(match self.last {
            None => self.created,
            Some(last) if self.dirty => last + interval,
            // Its age is that of what was last heard, which is now.
            Some(last) => last + interval.max(Duration::from_millis(self.file.max_age_ms / 4)),
        })
    }

    pub(crate) fn start(&mut self, nodes: &Nodes, cluster_id: u64, as_of: SystemTime) {
        self.last = Some(Instant::now());
        self.dirty = false;
        let (file, nodes) = (self.file.clone(), nodes.clone());
        let about = About {
            cluster_id,
            revision: nodes.revision(),
            ..self.about.clone()
        };
        let write = move || {
            file.tidy();
            file.write(&about, &nodes, as_of)
        };
        self.job = Some(tokio::task::spawn_blocking(write));
    }

    /// Waits for the write in progress; for ever if there is none.
    pub(crate) async fn done(&mut self) {
        let Some(job) = &mut self.job else {
            return std::future::pending().await;
        };
        let result = job.await;
        self.job = None;
        let path = self.file.path.display();
        match result {
            Ok(Ok(())) if std::mem::take(&mut self.failing) => {
                info!(%path, "the snapshot is written again");
            }
            Ok(Ok(())) => debug!(%path, "snapshot written"),
            Ok(Err(error)) => self.failed(&error),
            Err(error) if error.is_panic() => {
                self.failed(&self.file.error("the task that writes it panicked"));
            }
            // The runtime ends.
            Err(_) => {}
        }
    }

    /// What could not be written is as due as a change.
    fn failed(&mut self, error: &ClusterError) {
        self.dirty = true;
        if std::mem::replace(&mut self.failing, true) {
            debug!(%error, "the snapshot cannot be written yet");
        } else {
            warn!(%error, "the snapshot cannot be written; it will be tried again");
        }
    }

    /// Writes what has not been written yet, and waits for it.
    pub(crate) async fn finish(&mut self, nodes: &Nodes, cluster_id: u64, as_of: SystemTime) {
        if self.job.is_some() {
            self.done().await;
        }
        if self.dirty {
            self.start(nodes, cluster_id, as_of);
            self.done().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(json: &str) -> Vec<u8> {
        seal(json.as_bytes())
    }

    const GOOD: &str = r#"{"group":"g","key_prefix":"","cluster_id":7,"revision":9,"written":1700000000000,"nodes":[{"incarnation":5,"node":{"id":"n","ip":"10.0.0.1"}}]}"#;

    #[test]
    fn a_good_file_is_read() {
        let loaded = decode(&bytes(GOOD)).unwrap();
        assert_eq!((loaded.cluster_id, loaded.revision), (7, 9));
        assert_eq!(
            (loaded.nodes[0].id.as_str(), loaded.nodes[0].incarnation()),
            ("n", 5)
        );
    }

    #[test]
    fn each_damage_is_named() {
        let good = bytes(GOOD);
        assert!(
            decode(&good[..good.len() - 1])
                .unwrap_err()
                .contains("checksum")
        );
        let mut flipped = good.clone();
        flipped[60] ^= 1;
        assert!(decode(&flipped).unwrap_err().contains("checksum"));
        let newer = String::from_utf8(good.clone())
            .unwrap()
            .replace("snapshot 1", "snapshot 2");
        assert!(
            decode(newer.as_bytes())
                .unwrap_err()
                .contains("version \"2\"")
        );
        assert!(decode(b"").unwrap_err().contains("no snapshot"));
        assert!(decode(b"#!/bin/sh\n").unwrap_err().contains("no snapshot"));
        assert!(decode(&bytes("{}")).unwrap_err().contains("group"));
    }

    #[test]
    fn files_that_must_not_be_used_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nodes");
        let file = SnapshotFile::new(&path);
        file.validate("snapshot").unwrap();
        std::fs::write(&path, bytes(GOOD)).unwrap();
        let written = UNIX_EPOCH + Duration::from_millis(1_700_000_000_000);
        let read = |group: &str, age: i64| {
            let now = written.checked_add(Duration::from_secs(age.max(0).unsigned_abs()));
            let now = now.unwrap() - Duration::from_secs(age.min(0).unsigned_abs());
            file.read(group, "", now).map_err(|error| error.to_string())
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

    fn saver(path: &Path) -> Saver {
        Saver::new(SnapshotFile::new(path), About::default())
    }

    /// On a real clock, where two looks at it are never the same.
    #[tokio::test]
    async fn the_first_write_is_due_at_once_and_the_next_one_after_the_interval() {
        let directory = tempfile::tempdir().unwrap();
        let mut saver = saver(&directory.path().join("nodes"));
        let now = Instant::now();
        assert!(saver.due().unwrap() <= now);
        assert_eq!(saver.due(), saver.due(), "it does not move");
        saver.start(&Nodes::default(), 1, SystemTime::now());
        assert_eq!(saver.due(), None, "one at a time");
        saver.done().await;
        saver.changed();
        assert!(saver.due().unwrap() >= now + Duration::from_secs(10));
        assert!(saver.due().unwrap() <= Instant::now() + Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_write_that_fails_or_panics_is_tried_again_after_the_interval() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gone").join("nodes");
        let mut saver = saver(&path);
        let soon = || Instant::now() + Duration::from_secs(11);
        saver.start(&Nodes::default(), 1, SystemTime::now());
        saver.done().await;
        assert!(saver.failing && saver.due().unwrap() < soon());
        saver.failing = false;
        saver.dirty = false;
        saver.job = Some(tokio::task::spawn_blocking(|| panic!("told to")));
        saver.done().await;
        assert!(saver.failing && saver.due().unwrap() < soon());
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        saver.start(&Nodes::default(), 1, SystemTime::now());
        saver.done().await;
        assert!(!saver.failing && path.exists());
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(decode(&bytes).is_err());
        }

        /// With a right checksum too.
        #[test]
        fn any_contents(json in ".{0,200}") {
            prop_assert!(decode(&bytes(&json)).is_err());
        }
    }
}
