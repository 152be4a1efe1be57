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
    let is_of_variable = matches!(
        error.without_snippet(),
        Error::UnresolvedProperty { .. } | Error::InvalidPropertyName { .. }
    );
    // What could not be read as a name ends in "?"; of a variable only the section is known.
    let field = field.filter(|_| !is_of_variable);
    let field = field.map(|field| field.trim_end_matches(['?', '.']));
    let is_shown = |field: &&str| !field.is_empty() && field.split(['.', '[', ']']).all(is_plain);
    let field = field.filter(is_shown);
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
    if may_have_secret(text) || text.contains('@') {
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
        let known = |expected: &[&str]| format!("these are known: {}", expected.join(", "));
        let words = match error {
            Error::InvalidScalar { ty, .. } => expected_number(ty).map(str::to_owned),
            Error::InvalidBooleanStrict { .. } => Some("true or false is expected".to_owned()),
            Error::NullIntoString { .. } => Some("a value is missing".to_owned()),
            Error::Unexpected { expected, .. } => match *expected {
                "mapping start" => Some("fields and their values are expected".to_owned()),
                "sequence start" => Some("a list is expected".to_owned()),
                "scalar" | "string scalar" => Some("one value is expected".to_owned()),
                _ => None,
            },
            Error::SerdeMissingField { field, .. } => {
                Some(format!("the field `{field}` is missing"))
            }
            Error::SerdeUnknownField {
                field, expected, ..
            } => Some(match is_plain(field) {
                true => format!("there is no field `{field}` here; {}", known(expected)),
                false => format!("this is no field; {}", known(expected)),
            }),
            Error::SerdeUnknownVariant {
                variant, expected, ..
            } => Some(match is_plain(variant) {
                true => format!("`{variant}` is unknown; {}", known(expected)),
                false => format!("the value is unknown; {}", known(expected)),
            }),
            Error::DuplicateMappingKey { key, .. } => Some(match key.as_deref() {
                Some(key) if is_plain(key) => format!("the field `{key}` is given twice"),
                _ => "a field is given twice".to_owned(),
            }),
            Error::UnresolvedProperty { name, .. } => {
                Some(format!("the environment variable {name} is not set"))
            }
            Error::InvalidPropertyName { .. } => {
                Some("what stands between ${ and } is no name of a variable".to_owned())
            }
            // So that the values of variables are not shown, the parser says this of others, too.
            Error::Message { msg, .. } if msg.contains("interpolated") => {
                Some("the value cannot be used".to_owned())
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

/// Whether this looks like the name of a field. What looks otherwise may be a value in the wrong place, such as a
/// password behind a colon without a space.
fn is_plain(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    text.bytes().all(is_part)
}

/// Whether something that is called like a secret may have a value, however it is written.
fn may_have_secret(text: &str) -> bool {
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let has_value = |rest: &str| {
        let rest = rest.trim_start_matches(is_in_name);
        let rest = rest.trim_start_matches(['"', '\'', ' ']);
        let Some(value) = rest.strip_prefix(':').map(str::trim_start) else {
            return true;
        };
        let end = value.find([',', '}', ' ']).unwrap_or(value.len());
        !matches!(&value[..end], "null" | "~")
    };
    text.lines().any(|line| {
        // Without a space before it, it is a part of a value.
        let comment = match line.trim_start().starts_with('#') {
            true => 0,
            false => line.find(" #").unwrap_or(line.len()),
        };
        let line = line[..comment].to_lowercase();
        let mut names = [
            "passw", "secret", "token", "authoriz", "api-key", "api_key", "apikey",
        ]
        .into_iter();
        // The name of a cookie is none, and its value none of a field.
        let has_cookie = || {
            let line = line.replace("sticky_cookie", "");
            ["cookie: ", "cookie\": ", "cookie': "]
                .iter()
                .any(|name| line.contains(name))
        };
        names.any(|name| line.split(name).skip(1).any(has_value))
            || ["bearer ", "basic "]
                .iter()
                .any(|scheme| line.contains(scheme))
            || has_cookie()
    })
}
