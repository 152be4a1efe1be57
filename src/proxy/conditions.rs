//! Which requests a route is for.

use ::pingora::http::RequestHeader;
use http::header::HOST;
use http::uri::Authority;
use http::{HeaderName, HeaderValue, Method};
use regex::Regex;

use crate::config::{self, is_below, without_last_dot};

/// The conditions of a route; all of them have to be met.
#[derive(Debug)]
pub(super) struct Conditions {
    hosts: Vec<Host>,
    path: Path,
    scheme: Option<config::Scheme>,
    methods: Vec<Method>,
    /// `None` for any value.
    headers: Vec<(HeaderName, Option<HeaderValue>)>,
}

#[derive(Debug)]
enum Host {
    /// In lower case, as the other.
    Name(String),
    /// With the dot before it.
    Below(String),
}

#[derive(Debug)]
enum Path {
    Any,
    Below(String),
    Matches(Regex),
}

impl Conditions {
    /// What the file says, which has been checked.
    pub(super) fn new(route: &config::Route) -> Self {
        let host = |host: &String| {
            let host = without_last_dot(host).to_ascii_lowercase();
            match host.strip_prefix('*') {
                Some(end) => Host::Below(end.to_owned()),
                None => Host::Name(host),
            }
        };
        let methods = route.methods.iter();
        let header = |(name, value): (&String, &String)| {
            let value = match value.as_str() {
                "*" => None,
                value => Some(HeaderValue::from_str(value).ok()?),
            };
            Some((name.parse().ok()?, value))
        };
        Self {
            hosts: route.hosts.iter().map(host).collect(),
            path: match (&route.path, &route.path_regex) {
                (Some(path), _) => Path::Below(path.clone()),
                (None, Some(pattern)) => Path::Matches(pattern.regex().clone()),
                (None, None) => Path::Any,
            },
            scheme: route.scheme,
            methods: methods.filter_map(|method| method.parse().ok()).collect(),
            headers: route.headers.iter().filter_map(header).collect(),
        }
    }

    /// Whether they are met, by a request that came over TLS or not.
    pub(super) fn are_met_by(
        &self,
        request: &RequestHeader,
        is_over_tls: impl FnOnce() -> bool,
    ) -> bool {
        let path = request.uri.path();
        let is_path = match &self.path {
            Path::Any => true,
            Path::Below(above) => is_below(path, above),
            Path::Matches(pattern) => pattern.is_match(path),
        };
        is_path
            && self
                .scheme
                .is_none_or(|scheme| (scheme == config::Scheme::Https) == is_over_tls())
            && (self.methods.is_empty() || self.methods.contains(&request.method))
            && (self.hosts.is_empty() || self.is_host(request))
            && self.headers.iter().all(|(name, value)| {
                let mut given = request.headers.get_all(name).into_iter();
                match value {
                    Some(value) => given.any(|given| given == value),
                    None => given.next().is_some(),
                }
            })
    }

    fn is_host(&self, request: &RequestHeader) -> bool {
        let Some(asked) = host_of(request) else {
            return false;
        };
        let asked = without_last_dot(asked);
        self.hosts.iter().any(|host| match host {
            Host::Name(name) => asked.eq_ignore_ascii_case(name),
            Host::Below(end) => {
                let start = asked
                    .len()
                    .checked_sub(end.len())
                    .filter(|start| *start > 0);
                let found = start.and_then(|start| asked.get(start..));
                found.is_some_and(|found| found.eq_ignore_ascii_case(end))
            }
        })
    }

    /// The path after a rewrite.
    pub(super) fn rewritten(&self, path: &str, instead: &str) -> String {
        match &self.path {
            Path::Any => path.to_owned(),
            Path::Below(above) => {
                let rest = path.strip_prefix(above.as_str()).unwrap_or_default();
                let slashes = (instead.ends_with('/'), rest.starts_with('/'));
                match slashes {
                    (true, true) => format!("{instead}{}", &rest[1..]),
                    (false, false) if !rest.is_empty() => format!("{instead}/{rest}"),
                    _ => format!("{instead}{rest}"),
                }
            }
            Path::Matches(pattern) => {
                let path = pattern.replace(path, instead);
                match path.starts_with('/') {
                    true => path.into_owned(),
                    false => format!("/{path}"),
                }
            }
        }
    }
}

/// The name that a request asks for, without a port.
pub(super) fn host_of(request: &RequestHeader) -> Option<&str> {
    let field = request
        .headers
        .get(HOST)
        .and_then(|host| host.to_str().ok());
    let asked = field.or_else(|| request.uri.authority().map(Authority::as_str))?;
    // An address of IPv6 is in brackets.
    let end = asked.rfind(']').map_or(0, |end| end + 1);
    let port = asked[end..].find(':');
    let host = port.map_or(asked, |port| &asked[..end + port]);
    Some(
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, target: &str, headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut request = RequestHeader::build(method, target.as_bytes(), None).unwrap();
        for (name, value) in headers {
            request.append_header(*name, *value).unwrap();
        }
        request
    }

    fn conditions(yaml: &str) -> Conditions {
        Conditions::new(&serde_saphyr::from_str(yaml).unwrap())
    }

    #[test]
    fn all_conditions_have_to_be_met() {
        let get = |target: &str, headers: &[_]| request("GET", target, headers);
        for (yaml, request, expected) in [
            ("{}", get("/", &[]), true),
            ("{ path: /api }", get("/api?x=1", &[]), true),
            ("{ path: /api }", get("/api/x", &[]), true),
            ("{ path: /api }", get("/apis", &[]), false),
            ("{ path: /api/ }", get("/api", &[]), false),
            ("{ path_regex: '^/v[0-9]+/' }", get("/v12/x", &[]), true),
            ("{ path_regex: '^/v[0-9]+/' }", get("/x/v12/", &[]), false),
            ("{ methods: [PUT, GET] }", get("/", &[]), true),
            ("{ methods: [PUT] }", get("/", &[]), false),
            ("{ hosts: [a.b] }", get("/", &[("host", "A.b:80")]), true),
            ("{ hosts: [a.b] }", get("/", &[("host", "a.b.:80")]), true),
            ("{ hosts: [a.b] }", get("/", &[("host", "a.b..")]), false),
            ("{ hosts: [a.b.] }", get("/", &[("host", "a.b")]), true),
            ("{ hosts: [a.b.] }", get("/", &[("host", "a.b.")]), true),
            ("{ hosts: ['*.b.'] }", get("/", &[("host", "a.b")]), true),
            ("{ hosts: [a.b] }", get("/", &[("host", "x.a.b")]), false),
            (
                "{ hosts: ['*.a.b'] }",
                get("/", &[("host", "x.y.A.b")]),
                true,
            ),
            ("{ hosts: ['*.a.b'] }", get("/", &[("host", "a.b")]), false),
            ("{ hosts: ['*.a.b'] }", get("/", &[("host", ".a.b")]), false),
            (
                "{ hosts: ['::1'] }",
                get("/", &[("host", "[::1]:80")]),
                true,
            ),
            ("{ hosts: [a.b] }", get("/", &[]), false),
            ("{ headers: { X: '*' } }", get("/", &[("x", "")]), true),
            (
                "{ headers: { X: y } }",
                get("/", &[("x", "z"), ("x", "y")]),
                true,
            ),
            ("{ headers: { X: y } }", get("/", &[("x", "yy")]), false),
            ("{ path: /a, methods: [PUT] }", get("/a", &[]), false),
        ] {
            for is_over_tls in [false, true] {
                let met = conditions(yaml).are_met_by(&request, || is_over_tls);
                assert_eq!(met, expected, "{yaml} {:?}", request.uri);
            }
        }
        for (yaml, of_plain, of_tls) in [
            ("{ scheme: http }", true, false),
            ("{ scheme: https }", false, true),
            ("{ scheme: https, path: /x }", false, false),
        ] {
            let met =
                |is_over_tls: bool| conditions(yaml).are_met_by(&get("/", &[]), || is_over_tls);
            assert_eq!((met(false), met(true)), (of_plain, of_tls), "{yaml}");
        }
    }

    #[test]
    fn a_part_of_the_path_is_replaced() {
        for (yaml, instead, path, expected) in [
            ("{ path: /api }", "/", "/api/x", "/x"),
            ("{ path: /api }", "/", "/api", "/"),
            ("{ path: /api }", "/v1", "/api/x/", "/v1/x/"),
            ("{ path: /api }", "/v1", "/api", "/v1"),
            ("{ path: /api/ }", "/v1", "/api/x", "/v1/x"),
            ("{ path: / }", "/v1", "/x", "/v1/x"),
            (
                "{ path_regex: '^/u/(\\d+)' }",
                "/users/$1",
                "/u/7/x",
                "/users/7/x",
            ),
            (
                "{ path_regex: '^/(?<id>\\d+)$' }",
                "id/${id}",
                "/7",
                "/id/7",
            ),
        ] {
            assert_eq!(
                conditions(yaml).rewritten(path, instead),
                expected,
                "{yaml}"
            );
        }
    }
}
