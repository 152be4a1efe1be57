//! A file with what balancers have learned, for the next process.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::balance::{Balancer, Learned};
use crate::private_file;
use crate::supervise::say;

/// How long a start or a hand-over waits for a disk.
const MOST_WAIT: Duration = Duration::from_secs(2);
/// The maximum length of a file. A hundred thousand backends take 20 MiB.
const MAX_LENGTH: u64 = 256 << 20;

/// Where what is learned is kept.
#[derive(Debug, Clone)]
pub(crate) struct LearnedFile {
    pub(crate) path: PathBuf,
    /// From one write to the next.
    pub(crate) interval: Duration,
}

/// What is learned, by group.
pub(crate) type LearnedByGroup = BTreeMap<String, Learned>;

#[derive(Serialize, Deserialize)]
struct Contents {
    /// Unix time in milliseconds.
    written: u64,
    groups: LearnedByGroup,
}

/// Replaces the file. Blocks until it is on the disk.
pub(crate) fn write(path: &Path, groups: LearnedByGroup) -> Result<(), String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let contents = Contents {
        written: now.map_or(0, |now| now.as_millis() as u64),
        groups,
    };
    private_file::replace(path, |file| {
        let mut file = std::io::BufWriter::new(file);
        serde_json::to_writer(&mut file, &contents)?;
        std::io::Write::flush(&mut file)
    })
    .map_err(|error| error.to_string())
}

/// What the file says, and how long ago it was written; `None` if there is no file. Blocks.
pub(crate) fn read(path: &Path) -> Result<Option<(LearnedByGroup, Duration)>, String> {
    if let Ok(false) = path.try_exists() {
        return Ok(None);
    }
    let bytes = private_file::read(path, MAX_LENGTH)?;
    let contents: Contents =
        serde_json::from_slice(&bytes).map_err(|error| format!("it cannot be parsed: {error}"))?;
    let written = UNIX_EPOCH.checked_add(Duration::from_millis(contents.written));
    // The clock may have been set back: then it is taken to be new.
    let age = written.and_then(|written| SystemTime::now().duration_since(written).ok());
    Ok(Some((contents.groups, age.unwrap_or_default())))
}

/// Writes what is learned from now on, for as long as `is_kept` says so.
pub(super) async fn keep(
    file: &LearnedFile,
    group: &str,
    balancer: &Balancer,
    is_kept: &AtomicBool,
) -> Infallible {
    let LearnedFile { path, interval } = file;
    let from = path.clone();
    let _ = spawn_blocking(move || private_file::remove_abandoned(&from)).await;
    let (mut has_failed, mut written_at) = (false, None);
    loop {
        tokio::time::sleep(*interval).await;
        let now = Instant::now();
        let learned = balancer.learned(now);
        // Without requests there is nothing new, and a process that waits for its turn does not replace the file
        // of the one that serves.
        let passed = match written_at {
            Some(last) if !has_failed => now.duration_since(last),
            _ => Duration::MAX,
        };
        if !is_kept.load(Ordering::Relaxed) || !learned.is_new_since(passed) {
            continue;
        }
        written_at = Some(now);
        let groups = LearnedByGroup::from([(group.to_owned(), learned)]);
        let to = path.clone();
        let written = spawn_blocking(move || write(&to, groups)).await;
        // An error of the task says that it panicked, or that the runtime ends.
        let written = written.unwrap_or_else(|error| Err(error.to_string()));
        let path = path.display();
        let failed_before = std::mem::replace(&mut has_failed, written.is_err());
        say(|| match (&written, failed_before) {
            (Ok(()), true) => info!(%path, "the file with what was learned can be written again"),
            (Ok(()), false) => debug!(%path, "what was learned is written"),
            (Err(error), true) => debug!(error, %path, "what was learned still cannot be written"),
            (Err(error), false) => {
                warn!(error, %path, "what was learned of the backends cannot be written; it will be tried again");
            }
        });
    }
}

/// Begins with what the file says of this group.
pub(super) async fn begin_with(file: &LearnedFile, group: &str, balancer: &Balancer) {
    let path = &file.path;
    match within(path, |path| read(&path)).await {
        Ok(None) => {}
        Ok(Some((groups, age))) => teach(&groups, age, group, balancer),
        Err(error) => {
            let path = path.display();
            say(
                || warn!(error, %path, "what was learned of the backends cannot be read; the balancer begins anew"),
            );
        }
    }
}

/// Does something with a file that is no reason to wait for long.
pub(crate) async fn within<T: Send + 'static>(
    path: &Path,
    act: impl FnOnce(PathBuf) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let path = path.to_owned();
    match timeout(MOST_WAIT, spawn_blocking(move || act(path))).await {
        Ok(Ok(done)) => done,
        // It panicked, or the runtime ends.
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("the disk has not answered within {MOST_WAIT:?}")),
    }
}

/// Lets a balancer begin with what is said of its group.
pub(crate) fn teach(groups: &LearnedByGroup, age: Duration, group: &str, balancer: &Balancer) {
    if let Some(learned) = groups.get(group) {
        balancer.teach(learned, age, Instant::now());
        let backends = learned.len();
        say(|| {
            info!(
                backends,
                ?age,
                "begins with what a former process has learned"
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("learned");
        assert_eq!(read(&path), Ok(None));
        let groups = LearnedByGroup::from([("g".to_owned(), Learned::default())]);
        write(&path, groups.clone()).unwrap();
        let (same, age) = read(&path).unwrap().unwrap();
        assert_eq!(same, groups);
        assert!(age < Duration::from_secs(60));
        for damaged in ["", "{", "[]", r#"{"written":-1,"groups":{}}"#] {
            std::fs::write(&path, damaged).unwrap();
            assert!(read(&path).is_err(), "{damaged:?}");
        }
        // The greatest number is no time, which is no reason to fail.
        std::fs::write(
            &path,
            format!(r#"{{"written":{},"groups":{{}}}}"#, u64::MAX),
        )
        .unwrap();
        assert!(read(&path).is_ok());
        assert!(write(&directory.path().join("gone/learned"), groups).is_err());
    }
}
