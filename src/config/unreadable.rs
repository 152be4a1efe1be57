//! What errors say of a file: its name, the line and the field, and never a password.

use std::fmt;

use serde_saphyr::UserMessageFormatter;

use crate::error::ClusterError;

/// An error in this file.
pub(super) fn in_file(path: impl fmt::Display, reason: impl fmt::Display) -> ClusterError {
    ClusterError::ConfigFile {
        path: path.to_string(),
        reason: reason.to_string(),
    }
}

/// A text that could not be parsed. The error shows the lines around the place, unless one of them may
/// contain a password.
pub(super) fn unreadable(path: &str, text: &str, error: &serde_saphyr::Error) -> ClusterError {
    // An endpoint may contain a user and a password. That is refused, but only after it has been
    // read, and errors of the parser repeat what they cannot read.
    // In words for those who write files, not programs.
    let bare = error
        .without_snippet()
        .render_with_formatter(&UserMessageFormatter);
    if bare.contains('@') {
        let at = error.location();
        let at = at.map_or(String::new(), |at| {
            format!("line {} column {}: ", at.line(), at.column())
        });
        return in_file(
            path,
            format!(
                "{at}cannot be read; the text contains an @ and is not shown, because it may contain a password"
            ),
        );
    }
    if has_password(text) || text.contains('@') {
        in_file(path, bare)
    } else {
        in_file(path, error.render_with_formatter(&UserMessageFormatter))
    }
}

/// Whether some field whose name contains `password` has a value.
fn has_password(text: &str) -> bool {
    text.split("password").skip(1).any(|rest| {
        let rest = rest.trim_start_matches(['"', '\'', ' ']);
        let value = rest.strip_prefix(':').map(str::trim_start);
        value.is_some_and(|value| {
            let end = value.find([',', '}', '\n', ' ']).unwrap_or(value.len());
            !matches!(value[..end].trim_end(), "null" | "~")
        })
    })
}
