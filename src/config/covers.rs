//! What a path, and the name of a host, stand for. Pure.

#[cfg(feature = "pingora")]
use std::borrow::Cow;

/// Whether a path is this one, or below it.
pub(crate) fn is_below(path: &str, above: &str) -> bool {
    let Some(rest) = path.strip_prefix(above) else {
        return false;
    };
    rest.is_empty() || above.ends_with('/') || rest.starts_with('/')
}

/// What most servers take a path for: with its escapes decoded, and without empty and dotted segments (RFC 3986, section
/// 6.2.2). Nothing is made of a path that is written as usual.
#[cfg(feature = "pingora")]
pub(crate) fn normalized(path: &str) -> Cow<'_, str> {
    let is_usual = !path.contains('%') && !path.contains("//") && !path.contains("/.");
    if is_usual {
        return Cow::Borrowed(path);
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    let mut segments = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = segments.pop(),
            segment => segments.push(segment),
        }
    }
    let end = if decoded.ends_with('/') { "/" } else { "" };
    match segments.is_empty() {
        true => Cow::Borrowed("/"),
        false => Cow::Owned(format!("/{}{end}", segments.join("/"))),
    }
}

/// A name without the dot at the end that a full name may have.
pub(crate) fn without_last_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether each name that `other` is for is one that `own` is for.
pub(super) fn includes_host(own: &str, other: &str) -> bool {
    let name = |host| without_last_dot(host).to_ascii_lowercase();
    let (own, other) = (name(own), name(other));
    own == other
        || own.strip_prefix('*').is_some_and(|end| {
            let name = other.strip_prefix('*').unwrap_or(&other);
            name.len() > end.len() && name.ends_with(end)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "pingora")]
    #[test]
    fn a_path_has_many_spellings() {
        for (path, expected) in [
            ("/admin", "/admin"),
            ("/admin/", "/admin/"),
            ("//admin", "/admin"),
            ("/%61dmin/x", "/admin/x"),
            ("/x/../admin", "/admin"),
            ("/x/%2e%2E/admin", "/admin"),
            ("/./admin//x/", "/admin/x/"),
            ("/../..", "/"),
            ("/x%2Fy", "/x/y"),
            ("/%", "/%"),
            ("/.well-known", "/.well-known"),
            ("*", "*"),
        ] {
            assert_eq!(normalized(path), expected, "{path}");
        }
    }

    #[test]
    fn a_path_includes_what_is_below_it() {
        for (path, expected) in [
            ("/admin", true),
            ("/admin/x", true),
            ("/administrator", false),
            ("/files/x", true),
            ("/files", false),
            ("/", false),
        ] {
            let found = ["/admin", "/files/"]
                .iter()
                .any(|above| is_below(path, above));
            assert_eq!(found, expected, "{path}");
        }
    }
}
