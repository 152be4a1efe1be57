//! What errors say of a file: its name, the line and the field, and never a password.

use std::borrow::Cow;
use std::fmt;

use serde_saphyr::{Error, MessageFormatter, UserMessageFormatter, render_options};

use crate::error::ClusterError;

/// An error in this file.
pub(super) fn in_file(path: impl fmt::Display, reason: impl fmt::Display) -> ClusterError {
    ClusterError::ConfigFile {
        path: path.to_string(),
        reason: reason.to_string(),
    }
}

/// A text that could not be parsed, in this field if that is known. The error shows the lines around the place,
/// unless one of them may contain a password.
pub(super) fn unreadable(
    path: &str,
    text: &str,
    field: Option<&str>,
    error: &Error,
) -> ClusterError {
    // What could not be read as a name ends in "?". A name may be an endpoint in the wrong place.
    let field = field.map(|field| field.trim_end_matches(['?', '.']));
    let field = field.filter(|field| !field.is_empty() && !field.contains('@'));
    let in_file = |path: &str, reason: &str| {
        let reason = reason.strip_prefix("error: ").unwrap_or(reason);
        match field {
            Some(field) => in_file(path, format!("invalid {field}: {reason}")),
            None => in_file(path, reason),
        }
    };
    // An endpoint may contain a user and a password. That is refused, but only after it has been
    // read, and errors of the parser repeat what they cannot read.
    let bare = error.without_snippet().render_with_formatter(&PlainWords);
    if bare.contains('@') {
        let at = error.location();
        let at = at.map_or(String::new(), |at| {
            format!("line {} column {}: ", at.line(), at.column())
        });
        let reason = format!(
            "{at}cannot be read; the text contains an @ and is not shown, because it may contain a password"
        );
        return in_file(path, &reason);
    }
    if has_password(text) || text.contains('@') {
        in_file(path, &bare)
    } else {
        let options = render_options! { formatter: &PlainWords, source_name: Some(path) };
        in_file(path, &error.render_with_options(options))
    }
}

/// What the parser says, in words for those who write files, not programs.
struct PlainWords;

impl MessageFormatter for PlainWords {
    fn format_message<'a>(&self, error: &'a Error) -> Cow<'a, str> {
        let words = match error {
            Error::InvalidScalar { ty, .. } => expected_number(ty),
            Error::InvalidBooleanStrict { .. } => Some("true or false is expected"),
            Error::NullIntoString { .. } => Some("a value is missing"),
            Error::Unexpected { expected, .. } => match *expected {
                "mapping start" => Some("fields and their values are expected"),
                "sequence start" => Some("a list is expected"),
                "scalar" | "string scalar" => Some("one value is expected"),
                _ => None,
            },
            Error::SerdeMissingField { field, .. } => {
                return format!("the field `{field}` is missing").into();
            }
            Error::SerdeUnknownField {
                field, expected, ..
            } => {
                let known = expected.join(", ");
                return format!("there is no field `{field}` here; these are known: {known}")
                    .into();
            }
            Error::SerdeUnknownVariant {
                variant, expected, ..
            } => {
                let known = expected.join(", ");
                return format!("`{variant}` is unknown; these are known: {known}").into();
            }
            Error::DuplicateMappingKey { key: Some(key), .. } => {
                return format!("the field `{key}` is given twice").into();
            }
            Error::UnresolvedProperty { name, .. } => {
                return format!("the environment variable {name} is not set").into();
            }
            _ => None,
        };
        match words {
            Some(words) => words.into(),
            None => UserMessageFormatter.format_message(error),
        }
    }
}

/// What stands for a value of this type of Rust.
fn expected_number(rust: &str) -> Option<&'static str> {
    match rust {
        "u16" => Some("a whole number from 0 to 65535 is expected"),
        "u32" => Some("a whole number from 0 to 4294967295 is expected"),
        "u64" | "usize" => Some("a whole number, 0 or more, is expected"),
        "i32" | "i64" | "isize" => Some("a whole number is expected"),
        "floating point" => Some("a number is expected"),
        "boolean" => Some("true or false is expected"),
        _ => None,
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
