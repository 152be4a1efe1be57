//! What a path, and the name of a host, stand for. Pure.

/// Whether a path is this one, or below it.
pub(crate) fn is_below(path: &str, above: &str) -> bool {
    let Some(rest) = path.strip_prefix(above) else {
        return false;
    };
    rest.is_empty() || above.ends_with('/') || rest.starts_with('/')
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
