//! Whether a server can become a daemon as its file says. Pingora finds that out when its command has already returned, with
//! status 0, and nobody sees the error.

use std::fmt::Display;
use std::path::Path;

use ::pingora::server::configuration::ServerConf;
use nix::unistd::{Group, Uid, User, getegid, geteuid};
use rustix::fs::{Access, access};

use crate::error::ClusterError;

pub(super) fn check_daemon(server: &ServerConf) -> Result<(), ClusterError> {
    if !server.daemon {
        return Ok(());
    }
    let error = |field: &str, reason: String| Err(ClusterError::config(field, reason));
    let (own, own_group) = (geteuid(), getegid());
    let is_root = own == Uid::from_raw(0);
    if let Some(name) = &server.user {
        let user = match found("user", name, User::from_name(name)) {
            Ok(user) => user,
            Err(reason) => return error("user", reason),
        };
        if user.uid != own && !is_root && !has_capability(SETUID) {
            return error(
                "user",
                format!("{name:?}: only root can become another user"),
            );
        }
    }
    if let Some(name) = &server.group {
        let group = match found("group", name, Group::from_name(name)) {
            Ok(group) => group,
            Err(reason) => return error("group", reason),
        };
        if group.gid != own_group && !is_root && !has_capability(SETGID) {
            return error("group", format!("{name:?}: only root can change the group"));
        }
    }
    let moved_to = server
        .working_directory
        .as_deref()
        .unwrap_or(Path::new("/"));
    if let Err(reason) = access(moved_to, Access::EXEC_OK).and_then(|()| is_directory(moved_to)) {
        return error(
            "working_directory",
            format!("{}: {reason}", moved_to.display()),
        );
    }
    // It is written there, and the former one is renamed.
    let file = moved_to.join(&server.pid_file);
    let directory = file.parent().unwrap_or(moved_to);
    // One that is there can be written to, if not renamed.
    if file.is_file() && access(&file, Access::WRITE_OK).is_ok() {
        return Ok(());
    }
    match access(directory, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Ok(()),
        Err(reason) => error("pid_file", format!("{}: {reason}", directory.display())),
    }
}

/// As Linux numbers them.
const SETGID: u32 = 6;
const SETUID: u32 = 7;

/// Whether this process may do something that root may.
fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|it| u64::from_str_radix(it.trim(), 16).ok());
    effective.is_some_and(|it| it >> number & 1 == 1)
}

fn is_directory(path: &Path) -> Result<(), rustix::io::Errno> {
    match path.is_dir() {
        true => Ok(()),
        false => Err(rustix::io::Errno::NOTDIR),
    }
}

/// Who has this name.
fn found<T>(kind: &str, name: &str, found: Result<Option<T>, impl Display>) -> Result<T, String> {
    match found {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(format!("{name:?}: the system knows no {kind} of this name")),
        Err(error) => Err(format!("{name:?}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_daemon_cannot_become_is_an_error_that_names_the_field() {
        let directory = tempfile::tempdir().unwrap();
        let able = || ServerConf {
            daemon: true,
            working_directory: Some(directory.path().to_owned()),
            pid_file: "x.pid".to_owned(),
            ..ServerConf::default()
        };
        check_daemon(&able()).unwrap();
        // Nothing of it counts otherwise.
        check_daemon(&ServerConf {
            daemon: false,
            user: Some("nobody of this name".to_owned()),
            ..able()
        })
        .unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        for (field, server) in [
            (
                "user",
                ServerConf {
                    user: Some("1000000".to_owned()),
                    ..able()
                },
            ),
            (
                "group",
                ServerConf {
                    group: Some("nobody of this name".to_owned()),
                    ..able()
                },
            ),
            (
                "working_directory",
                ServerConf {
                    working_directory: Some(file),
                    ..able()
                },
            ),
            (
                "pid_file",
                ServerConf {
                    pid_file: "missing/x.pid".to_owned(),
                    ..able()
                },
            ),
        ] {
            let error = check_daemon(&server).unwrap_err().to_string();
            assert!(error.starts_with(&format!("invalid {field}: ")), "{error}");
        }
    }
}
