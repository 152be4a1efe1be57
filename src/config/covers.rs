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

/// Whether a path is this one or below it for some server: as it is written, or [`normalized`], or on the way from one to
/// the other, with or without parameters (`;...`) in its segments and with or without empty segments.
#[cfg(feature = "pingora")]
pub(crate) fn may_be_below(path: &str, above: &str) -> bool {
    if is_below(path, above) {
        return true;
    }
    let is_usual = !path.contains(['%', ';']) && !path.contains("//") && !path.contains("/.");
    if is_usual {
        return false;
    }
    let decoded = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    let ways = [(false, false), (false, true), (true, false), (true, true)];
    ways.into_iter().any(|(keeps_empty, keeps_parameters)| {
        passes_below(&decoded, above, keeps_empty, keeps_parameters)
    })
}

/// Whether a path is below another one when some of its segments have been followed.
#[cfg(feature = "pingora")]
fn passes_below(path: &str, above: &str, keeps_empty: bool, keeps_parameters: bool) -> bool {
    let mut so_far = String::new();
    let mut segments = path.strip_prefix('/').unwrap_or(path).split('/');
    segments.any(|segment| {
        let name = match keeps_parameters {
            true => segment,
            false => segment.split(';').next().unwrap_or_default(),
        };
        match name {
            "" if !keeps_empty => {}
            "." => {}
            ".." => so_far.truncate(so_far.rfind('/').unwrap_or(0)),
            name => {
                so_far.push('/');
                so_far.push_str(name);
            }
        }
        is_below(&so_far, above) || above.strip_suffix('/') == Some(&so_far)
    })
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

    #[cfg(feature = "pingora")]
    #[test]
    fn a_path_may_be_below_another_one_for_some_server() {
        for (path, expected) in [
            ("/admin", true),
            ("/admin/../y", true),
            ("/admin/x/..%2f..%2fy", true),
            ("/%61dmin/../y", true),
            ("/x/..//admin/y", true),
            ("/admin;v=1", true),
            ("/a;b/../admin;v=1/x", true),
            ("/files", false),
            ("/files;x/", true),
            ("/files%2Fx", true),
            ("/administrator", false),
            ("/%61dministrator", false),
            ("/x;/admin", false),
            ("/a/;x/../deep", true),
            ("/a/..;b/../deep", true),
            ("/a//../deep", true),
            ("/a/b/../%64eep/x", true),
            ("/a/deeper", false),
            ("/", false),
            ("*", false),
        ] {
            let found = ["/admin", "/files/", "/a/deep"]
                .iter()
                .any(|above| may_be_below(path, above));
            assert_eq!(found, expected, "{path}");
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
