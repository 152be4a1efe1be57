//! Checks of endpoints, and their form in errors and logs.

use crate::error::ClusterError;

/// The scheme of the in-memory store.
pub(super) const MEMORY: &str = "memory://";

/// An endpoint as it may be shown: without the part before an `@` or after a `?`, which may contain a
/// password.
pub(super) fn redacted(endpoint: &str) -> String {
    if endpoint.starts_with(MEMORY) {
        return endpoint.to_owned();
    }
    let scheme = ["http://", "https://"]
        .into_iter()
        .find(|scheme| endpoint.starts_with(scheme))
        .unwrap_or_default();
    // After the last `@`: a password may contain one, and a slash or a question mark too.
    let (hidden, rest) = match endpoint.rsplit_once('@') {
        Some((_, rest)) => ("...@", rest),
        None => ("", &endpoint[scheme.len()..]),
    };
    match rest.split_once('?') {
        Some((rest, _)) => format!("{scheme}{hidden}{rest}?..."),
        None => format!("{scheme}{hidden}{rest}"),
    }
}

/// Whether two endpoints are the same host and port, with or without a scheme.
pub(super) fn is_same(one: &str, other: &str) -> bool {
    let bare = |endpoint: &str| {
        let rest = endpoint.rsplit("//").next().unwrap_or_default();
        rest.trim_end_matches('/').to_owned()
    };
    bare(one) == bare(other)
}

/// Checks one of `count` endpoints. `tls`: whether TLS options are given.
pub(super) fn check(endpoint: &str, count: usize, tls: bool) -> Result<(), ClusterError> {
    let invalid = |reason: &str| {
        Err(ClusterError::InvalidEndpoint {
            endpoint: redacted(endpoint),
            reason: reason.to_owned(),
        })
    };
    if endpoint.starts_with(MEMORY) {
        return if count == 1 {
            Ok(())
        } else {
            invalid("the in-memory store cannot be combined with other endpoints")
        };
    }
    if endpoint.contains('@') {
        return invalid(
            "it must not contain user and password: use credentials (in the file: user, with \
             password_file, password_env or password)",
        );
    }
    #[cfg(not(feature = "tls"))]
    if endpoint.starts_with("https://") {
        return invalid(super::tls::NEEDS_FEATURE);
    }
    if tls && endpoint.starts_with("http://") {
        return invalid("TLS is configured, so the scheme must be https://");
    }
    let rest = endpoint
        .strip_prefix("https://")
        .or_else(|| endpoint.strip_prefix("http://"))
        .unwrap_or(endpoint);
    if rest.contains("://") {
        return invalid("the scheme must be http://, https:// or memory://");
    }
    match format!("http://{rest}").parse::<http::Uri>() {
        Err(error) => invalid(&error.to_string()),
        Ok(uri) if uri.host().is_none_or(str::is_empty) => invalid("it has no host"),
        Ok(uri) if uri.port_u16().is_none() => invalid("it has no port; etcd's default is 2379"),
        Ok(uri) if uri.path() != "/" || uri.query().is_some() => {
            invalid("it must consist of scheme, host and port only")
        }
        Ok(_) => Ok(()),
    }
}
