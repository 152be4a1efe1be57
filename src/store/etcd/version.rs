//! What depends on the version of the server.

fn parse(version: &str) -> (u32, u32, u32) {
    let mut parts = version
        .split(['.', '-', '+'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut part = || parts.next().unwrap_or(0);
    (part(), part(), part())
}

/// Whether a watch can continue from the revision in an answer to a progress request. Before 3.5.13
/// that revision could be ahead of events that were still to come.
pub(super) fn has_reliable_progress(version: &str) -> bool {
    parse(version) >= (3, 5, 13)
}

/// Whether renewals of a revoked lease succeed: before 3.5.23 and 3.6.5.
pub(super) fn has_lease_bug(version: &str) -> bool {
    match parse(version) {
        (3, 5, patch) => patch < 23,
        (3, 6, patch) => patch < 5,
        (major, minor, _) => (major, minor) < (3, 5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_reliable_progress() {
        for version in ["3.5.13", "3.5.28+", "3.5.30", "3.6.0", "4.0.0"] {
            assert!(has_reliable_progress(version), "{version}");
        }
        for version in ["3.4.99", "3.5.12", "3.5.1", "?"] {
            assert!(!has_reliable_progress(version), "{version}");
        }
    }

    #[test]
    fn versions_with_the_lease_bug() {
        for version in ["3.4.30", "3.5.1", "3.5.22", "3.6.0", "3.6.4", "nonsense"] {
            assert!(has_lease_bug(version), "{version}");
        }
        for version in [
            "3.5.23",
            "3.5.28+",
            "3.5.30",
            "3.6.5",
            "3.7.0-rc.1",
            "4.0.0",
        ] {
            assert!(!has_lease_bug(version), "{version}");
        }
    }
}
