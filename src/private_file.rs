//! Files that only this user writes, and that are replaced as a whole.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

/// The suffix of a file that is being written.
const TEMPORARY: &str = ".tmp";
/// A temporary file that is older than this is left over: no write takes that long.
const ABANDONED: Duration = Duration::from_secs(600);

/// Where the file is.
pub(crate) fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

fn temporary_prefix(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    format!(".{}.", name.to_string_lossy())
}

/// Replaces the file by a new one with mode 0600, which is complete. Blocks until it is on the disk.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = tempfile::Builder::new()
        .prefix(&temporary_prefix(path))
        .suffix(TEMPORARY)
        .tempfile_in(directory(path))?;
    write(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The new name has to be on the disk too.
    File::open(directory(path))?.sync_all()
}

/// Removes temporary files of processes that were killed while they wrote.
pub(crate) fn remove_abandoned(path: &Path) {
    let prefix = temporary_prefix(path);
    let Ok(entries) = std::fs::read_dir(directory(path)) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_old = || {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED))
        };
        if name.starts_with(&prefix) && name.ends_with(TEMPORARY) && is_old() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Reads the file, if nobody else may write it and it is no longer than `most` bytes. Blocks.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>, String> {
    let told = |error: io::Error| error.to_string();
    let file = open(path).map_err(told)?;
    let metadata = file.metadata().map_err(told)?;
    if !metadata.is_file() {
        return Err("it is not a file".to_owned());
    }
    check_owner_and_mode(&metadata)?;
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(told)?;
    match bytes.len() as u64 > most {
        true => Err(format!("it is longer than {most} bytes")),
        false => Ok(bytes),
    }
}

/// Opens a file, and waits for nobody: a pipe of somebody else would be opened only when it is written to.
#[cfg(unix)]
fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    File::options()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path)
}

#[cfg(not(unix))]
fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

#[cfg(unix)]
fn check_owner_and_mode(metadata: &std::fs::Metadata) -> Result<(), String> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let (mode, owner) = (metadata.permissions().mode() & 0o777, metadata.uid());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(format!("it belongs to another user (uid {owner})"));
    }
    // Kubernetes gives volumes to the group of a pod (`fsGroup`), with all rights.
    let is_of_others = mode & 0o020 != 0 && !is_own_group(metadata.gid());
    if mode & 0o002 != 0 || is_of_others {
        return Err(format!("others may write it (mode {mode:04o})"));
    }
    Ok(())
}

/// Whether this process is in a group.
#[cfg(unix)]
fn is_own_group(group: u32) -> bool {
    let others = rustix::process::getgroups().unwrap_or_default();
    let own = std::iter::once(rustix::process::getegid());
    own.chain(others).any(|own| own.as_raw() == group)
}

#[cfg(not(unix))]
fn check_owner_and_mode(_: &std::fs::Metadata) -> Result<(), String> {
    Ok(())
}
