//! The `routes` section: which requests go where.

use std::collections::BTreeMap;

use http::{HeaderName, HeaderValue, Method};
use regex::Regex;
use serde::Deserialize;

use super::covers::{includes_host, is_below, without_last_dot};
use super::references::without_references;
use super::timeouts::BackendTimeouts;
use super::values::Scheme;
use crate::error::{ClusterError, in_range};

/// One of `routes`. The first route that is for a request decides what becomes of it; a request that none is
/// for goes to the group of the section itself. A condition that is not given is met by every request. All
/// that are given have to be met, and one that has several values by one of them.
///
/// Paths are compared as the client wrote them: nothing is decoded, and `/a/../b` is not `/b`. So a route
/// is no means to keep somebody from a path.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Route {
    /// The name in logs, metrics and the page. Default: `route-N`, counted from 1.
    pub name: Option<String>,
    /// Names that the request asks for, without a port: `api.example.com`, or `*.example.com` for every
    /// name below it. Upper and lower case are the same.
    pub hosts: Vec<String>,
    /// The path, or the one above it: `/api` is for `/api` and `/api/x`, but not for `/apis`.
    pub path: Option<String>,
    /// A regular expression that a part of the path matches; with `^` and `$` all of it. Cannot be given
    /// together with `path`.
    pub path_regex: Option<Pattern>,
    /// Whether the client came over TLS (`https`) or not (`http`). Of a request from one of
    /// `clients.trusted_proxies`, its `X-Forwarded-Proto` says it.
    pub scheme: Option<Scheme>,
    /// Methods, such as `GET`, as they are sent.
    pub methods: Vec<String>,
    /// Fields of the request that have exactly this value, or, with `*`, any value.
    pub headers: BTreeMap<String, String>,

    /// The group that serves it: one of `groups`, or `default`. A route has exactly one of `group`, `split`,
    /// `redirect` and `answer`.
    pub group: Option<String>,
    /// Several groups, each with its weight, from 0 to 1,000,000: with `{ api: 95, canary: 5 }`, one of 20
    /// requests goes to `canary`. Each request is drawn anew.
    pub split: BTreeMap<String, u32>,
    /// Sends the client elsewhere.
    pub redirect: Option<Redirect>,
    /// Answers without a backend.
    pub answer: Option<Answer>,

    /// Whether all of its requests are for the leader of the group. Default: `false`, as the group says.
    pub leader: bool,
    /// How often a request is tried on another backend. Default: as the group. Range: 0 to 2.
    pub retries: Option<usize>,
    /// Only [`request_ms`](BackendTimeouts::request_ms), [`response_ms`](BackendTimeouts::response_ms),
    /// [`read_ms`](BackendTimeouts::read_ms) and [`tunnel_ms`](BackendTimeouts::tunnel_ms). Default: as the group.
    pub timeouts: BackendTimeouts,
    /// What the backend gets instead of the request's path and host.
    pub rewrite: Rewrite,
    /// Changes of the fields that the backend gets.
    pub request_headers: HeaderChanges,
    /// Changes of the fields that the client gets.
    pub response_headers: HeaderChanges,
    /// Sends a copy elsewhere, whose answer nobody gets.
    pub mirror: Option<Mirror>,
}

/// A regular expression, as of the crate `regex`: it takes time in proportion to the text.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(Regex);

impl Pattern {
    /// The expression.
    pub fn regex(&self) -> &Regex {
        &self.0
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Regex::new(&text)
            .map(Self)
            .map_err(|error| format!("{text:?} is not a regular expression: {error}"))
    }
}

/// Where a client is sent to.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Redirect {
    /// The field `Location`. In it, `{host}` is the name that the request asks for, without a port, `{path}` its
    /// path and `{query}` its query with the question mark: `https://{host}{path}{query}`.
    pub to: String,
    /// Default: 308. One of 301, 302, 303, 307, 308.
    #[serde(default = "default_redirect_status")]
    pub status: u16,
}

pub(super) fn default_redirect_status() -> u16 {
    308
}

/// A response without a backend.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Answer {
    /// Default: 200. Range: 200 to 599.
    pub status: u16,
    /// Default: none.
    pub body: String,
    /// Default: `text/plain; charset=utf-8`.
    pub content_type: String,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            status: 200,
            body: String::new(),
            content_type: "text/plain; charset=utf-8".to_owned(),
        }
    }
}

/// What the backend gets instead of the request's path and host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Rewrite {
    /// Stands for the part of the path that the route's `path` is, or that its `path_regex` matches, where
    /// `$1` or `${name}` is what a group of it matched. Default: none, the path stays.
    pub path: Option<String>,
    /// The host. Default: none, the client's.
    pub host: Option<String>,
}

/// Changes of header fields: first what is removed, then what is set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct HeaderChanges {
    /// Fields that are removed.
    pub remove: Vec<String>,
    /// Fields that get this value, whether they are there or not.
    pub set: BTreeMap<String, String>,
}

/// A copy of requests for another group.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Mirror {
    /// The group: one of `groups`, or `default`.
    pub group: String,
    /// How many of a hundred requests. Default: 100. Range: 0 to 100.
    #[serde(default = "default_percent")]
    pub percent: f64,
    /// Requests with a longer body are not copied, because it has to be kept. Default: 65,536. Range: 0 to
    /// 10,000,000 bytes.
    #[serde(default = "default_mirror_body")]
    pub body_bytes: usize,
}

pub(super) fn default_percent() -> f64 {
    100.0
}

pub(super) fn default_mirror_body() -> usize {
    65_536
}

/// Fields that say how a message ends or how a connection goes on, which a proxy decides, and those that this
/// one sets.
const NOT_CHANGED: [&str; 12] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
    "x-leader-epoch",
    "x-leader-reads-until",
];

impl Route {
    /// The groups that it can send requests to, with the fields that name them.
    pub(super) fn groups(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let one = self.group.iter().map(|group| ("group", group.as_str()));
        let several = self.split.keys().map(|group| ("split", group.as_str()));
        let copy = self.mirror.iter();
        let copy = copy.map(|mirror| ("mirror.group", mirror.group.as_str()));
        one.chain(several).chain(copy)
    }

    fn reaches_backends(&self) -> bool {
        self.group.is_some() || !self.split.is_empty()
    }

    /// Checks every field. Errors name the field as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and what is allowed.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let error = |name: &str, reason: String| {
            let field = if name.is_empty() {
                field.to_owned()
            } else {
                format!("{field}.{name}")
            };
            Err(ClusterError::config(field, reason))
        };
        self.check_conditions(field)?;
        let actions = [
            self.group.is_some(),
            !self.split.is_empty(),
            self.redirect.is_some(),
            self.answer.is_some(),
        ];
        if actions.iter().filter(|is_given| **is_given).count() != 1 {
            let reason = "exactly one of group, split, redirect and answer has to be given";
            return error("", reason.to_owned());
        }
        if !self.reaches_backends() {
            let of_backends = [
                ("leader", self.leader),
                ("retries", self.retries.is_some()),
                ("timeouts", self.timeouts != BackendTimeouts::default()),
                ("rewrite", self.rewrite != Rewrite::default()),
                (
                    "request_headers",
                    self.request_headers != HeaderChanges::default(),
                ),
                ("mirror", self.mirror.is_some()),
            ];
            if let Some((name, _)) = of_backends.iter().find(|(_, is_given)| *is_given) {
                return error(name, "has no effect without a group".to_owned());
            }
        }
        if !self.split.is_empty() && self.split.values().all(|weight| *weight == 0) {
            return error("split", "all weights are 0".to_owned());
        }
        for weight in self.split.values() {
            in_range(field, "split", *weight as usize, 0..=1_000_000)?;
        }
        self.check_rewrite(field)?;
        self.check_answers(field)?;
        self.request_headers
            .validate(&format!("{field}.request_headers"))?;
        self.response_headers
            .validate(&format!("{field}.response_headers"))?;
        if let Some(retries) = self.retries {
            in_range(field, "retries", retries, 0..=2)?;
        }
        self.check_timeouts(field)?;
        if let Some(mirror) = &self.mirror {
            let field = format!("{field}.mirror");
            in_range(&field, "percent", mirror.percent, 0.0..=100.0)?;
            in_range(&field, "body_bytes", mirror.body_bytes, 0..=10_000_000)?;
        }
        Ok(())
    }

    fn check_conditions(&self, field: &str) -> Result<(), ClusterError> {
        let error = |name: &str, reason: String| {
            Err(ClusterError::config(format!("{field}.{name}"), reason))
        };
        for host in &self.hosts {
            let name = host.strip_prefix("*.").unwrap_or(host);
            let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            let is_ip = host.parse::<std::net::IpAddr>().is_ok();
            if !is_ip && (without_last_dot(name).is_empty() || !name.bytes().all(is_part)) {
                let reason = format!(
                    "{host:?} is not a name such as example.com or *.example.com, without a port"
                );
                return error("hosts", reason);
            }
        }
        if let Some(path) = &self.path
            && (!path.starts_with('/') || path.contains(['?', '#', ' ']))
        {
            return error("path", format!("{path:?} is not a path such as /api"));
        }
        if self.path.is_some() && self.path_regex.is_some() {
            return error(
                "path_regex",
                "cannot be given together with path".to_owned(),
            );
        }
        for method in &self.methods {
            let is_method = Method::from_bytes(method.as_bytes()).is_ok();
            if !is_method || method.bytes().any(|byte| byte.is_ascii_lowercase()) {
                return error("methods", format!("{method:?} is not a method such as GET"));
            }
        }
        for (name, value) in &self.headers {
            check_header(&format!("{field}.headers"), name, value)?;
            if name.eq_ignore_ascii_case("host") {
                let reason = "\"host\" is no field over HTTP/2: use hosts instead";
                return error("headers", reason.to_owned());
            }
        }
        Ok(())
    }

    fn check_rewrite(&self, field: &str) -> Result<(), ClusterError> {
        let error = |name: &str, reason: String| {
            Err(ClusterError::config(
                format!("{field}.rewrite.{name}"),
                reason,
            ))
        };
        if let Some(path) = &self.rewrite.path {
            if self.path.is_none() && self.path_regex.is_none() {
                return error(
                    "path",
                    "needs path or path_regex, a part of which it replaces".to_owned(),
                );
            }
            let is_path = |byte: u8| byte.is_ascii_graphic() && !b"?#".contains(&byte);
            if !path.bytes().all(is_path) || self.path.is_some() && !path.starts_with('/') {
                return error("path", format!("{path:?} is not a path such as /api"));
            }
            let text = match &self.path_regex {
                Some(pattern) => without_references(path, pattern.regex()),
                None => Ok(path.clone()),
            };
            match text.map(|text| format!("/{text}").parse::<http::uri::PathAndQuery>()) {
                Ok(Ok(_)) => {}
                Ok(Err(_)) => {
                    return error("path", format!("{path:?} has a sign that no path has"));
                }
                Err(name) => {
                    return error("path", format!("${{{name}}} is no group of path_regex"));
                }
            }
        }
        if let Some(host) = &self.rewrite.host
            && (host.contains('@') || host.parse::<http::uri::Authority>().is_err())
        {
            return error(
                "host",
                format!("{host:?} is not a host such as example.com"),
            );
        }
        Ok(())
    }

    fn check_answers(&self, field: &str) -> Result<(), ClusterError> {
        if let Some(redirect) = &self.redirect {
            let field = format!("{field}.redirect");
            if ![301, 302, 303, 307, 308].contains(&redirect.status) {
                let reason = format!("{} is none of 301, 302, 303, 307, 308", redirect.status);
                return Err(ClusterError::config(format!("{field}.status"), reason));
            }
            let rest = ["{host}", "{path}", "{query}"]
                .iter()
                .fold(redirect.to.clone(), |text, name| text.replace(name, ""));
            let begins = ["/", "http://", "https://", "{path}"];
            if !begins.iter().any(|begin| redirect.to.starts_with(begin))
                || !rest.bytes().all(|byte| byte.is_ascii_graphic())
                || rest.contains(['{', '}'])
            {
                let reason = format!(
                    "{:?} is not an address; it begins with https://, http:// or /, and may contain {{host}}, {{path}} and {{query}}",
                    redirect.to
                );
                return Err(ClusterError::config(format!("{field}.to"), reason));
            }
        }
        if let Some(answer) = &self.answer {
            let field = format!("{field}.answer");
            in_range(&field, "status", u64::from(answer.status), 200..=599)?;
            if matches!(answer.status, 204 | 304) && !answer.body.is_empty() {
                let reason = format!("a response with the status {} has none", answer.status);
                return Err(ClusterError::config(format!("{field}.body"), reason));
            }
            check_header(&field, "content-type", &answer.content_type)?;
        }
        Ok(())
    }

    fn check_timeouts(&self, field: &str) -> Result<(), ClusterError> {
        let times = &self.timeouts;
        for (name, is_given) in [
            ("connect_ms", times.connect_ms.is_some()),
            ("handshake_ms", times.handshake_ms.is_some()),
            ("pool_idle_ms", times.pool_idle_ms.is_some()),
            ("tcp_user_timeout_ms", times.tcp_user_timeout_ms.is_some()),
        ] {
            if is_given {
                let reason = "is of a group, because connections are of a group";
                return Err(ClusterError::config(
                    format!("{field}.timeouts.{name}"),
                    reason,
                ));
            }
        }
        let mut all = super::timeouts::Timeouts::default();
        times.replace_in(&mut all);
        all.validate(&format!("{field}.timeouts"))
    }

    /// Whether this route is for every request that the other one is for.
    pub(super) fn includes(&self, other: &Self) -> bool {
        let includes_hosts = self.hosts.is_empty()
            || !other.hosts.is_empty()
                && other
                    .hosts
                    .iter()
                    .all(|host| self.hosts.iter().any(|own| includes_host(own, host)));
        let includes_path = match (&self.path, &self.path_regex) {
            (Some(own), _) => other.path.as_ref().is_some_and(|path| is_below(path, own)),
            (None, Some(own)) => other.path_regex.as_ref() == Some(own),
            (None, None) => true,
        };
        let includes_methods = self.methods.is_empty()
            || !other.methods.is_empty()
                && other.methods.iter().all(|it| self.methods.contains(it));
        let includes_headers = self.headers.iter().all(|(name, value)| {
            let same = |(other, _): &(&String, &String)| other.eq_ignore_ascii_case(name);
            let found = other.headers.iter().find(same);
            found.is_some_and(|(_, other)| value == "*" || value == other)
        });
        let includes_scheme = self.scheme.is_none() || self.scheme == other.scheme;
        includes_hosts && includes_path && includes_scheme && includes_methods && includes_headers
    }
}

impl HeaderChanges {
    fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let set = self
            .set
            .iter()
            .map(|(name, value)| ("set", name, value.as_str()));
        let removed = self.remove.iter().map(|name| ("remove", name, ""));
        for (kind, name, value) in set.chain(removed) {
            let field = format!("{field}.{kind}");
            check_header(&field, name, value)?;
            if NOT_CHANGED.contains(&&*name.to_ascii_lowercase()) {
                let reason = format!("{name:?} is decided by the proxy and cannot be changed");
                return Err(ClusterError::config(field, reason));
            }
        }
        Ok(())
    }
}

pub(super) fn check_header(field: &str, name: &str, value: &str) -> Result<(), ClusterError> {
    if HeaderName::from_bytes(name.as_bytes()).is_err() {
        let reason = format!("{name:?} is not the name of a header field");
        return Err(ClusterError::config(field, reason));
    }
    if HeaderValue::from_str(value).is_err() {
        let reason =
            format!("the value of {name:?} has characters that a header field cannot have");
        return Err(ClusterError::config(field, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(yaml: &str) -> Route {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn error(yaml: &str) -> String {
        route(yaml).validate("routes[0]").unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_meant_is_an_error_that_names_its_field() {
        for (yaml, expected) in [
            ("{ path: /x }", "exactly one of"),
            ("{ group: a, answer: {} }", "exactly one of"),
            ("{ group: a, path: x }", "routes[0].path"),
            (
                "{ group: a, path: /x, path_regex: x }",
                "routes[0].path_regex",
            ),
            ("{ group: a, methods: [get] }", "routes[0].methods"),
            (
                "{ group: a, path_regex: '^/u/([0-9]+)', rewrite: { path: '/user_$1x' } }",
                "${1x} is no group of path_regex",
            ),
            (
                "{ group: a, path_regex: '^/u', rewrite: { path: '/$1' } }",
                "routes[0].rewrite.path",
            ),
            (
                "{ group: a, path: /x, rewrite: { path: '/a<b' } }",
                "routes[0].rewrite.path",
            ),
            ("{ group: a, hosts: ['a:80'] }", "routes[0].hosts"),
            ("{ group: a, hosts: ['*'] }", "routes[0].hosts"),
            ("{ group: a, headers: { 'x y': z } }", "routes[0].headers"),
            ("{ split: { a: 0 } }", "all weights are 0"),
            ("{ split: { a: 9000000 } }", "routes[0].split"),
            ("{ answer: {}, retries: 1 }", "routes[0].retries"),
            ("{ answer: {}, leader: true }", "routes[0].leader"),
            ("{ answer: { status: 100 } }", "routes[0].answer.status"),
            (
                "{ answer: { status: 204, body: x } }",
                "routes[0].answer.body",
            ),
            (
                "{ answer: { content_type: \"a\\nb\" } }",
                "routes[0].answer",
            ),
            (
                "{ redirect: { to: 'https://{hots}/' } }",
                "routes[0].redirect.to",
            ),
            (
                "{ redirect: { to: /, status: 200 } }",
                "routes[0].redirect.status",
            ),
            (
                "{ group: a, rewrite: { path: /x } }",
                "routes[0].rewrite.path",
            ),
            (
                "{ group: a, path: /y, rewrite: { path: x } }",
                "routes[0].rewrite.path",
            ),
            (
                "{ group: a, rewrite: { host: 'a b' } }",
                "routes[0].rewrite.host",
            ),
            (
                "{ group: a, request_headers: { remove: [host] } }",
                "routes[0].request_headers.remove",
            ),
            (
                "{ group: a, response_headers: { set: { Via: x } } }",
                "routes[0].response_headers.set",
            ),
            ("{ group: a, retries: 3 }", "routes[0].retries"),
            (
                "{ group: a, timeouts: { connect_ms: 1 } }",
                "routes[0].timeouts.connect_ms",
            ),
            (
                "{ group: a, timeouts: { response_ms: 0 } }",
                "routes[0].timeouts.response_ms",
            ),
            (
                "{ group: a, mirror: { group: b, percent: 101 } }",
                "routes[0].mirror.percent",
            ),
        ] {
            let found = error(yaml);
            assert!(found.contains(expected), "{yaml}: {found}");
        }
        let pattern = serde_saphyr::from_str::<Route>("{ path_regex: '(' }");
        assert!(
            pattern
                .unwrap_err()
                .to_string()
                .contains("not a regular expression")
        );
    }

    #[test]
    fn a_route_that_includes_another_one_shadows_it() {
        for (first, second, expected) in [
            ("{}", "{ path: /x }", true),
            ("{ path: /x }", "{}", false),
            ("{ path: /x }", "{ path: /x/y }", true),
            ("{ path: /x }", "{ path: /xy }", false),
            ("{ path: / }", "{ path: /x }", true),
            ("{ path: /x }", "{ path_regex: ^/x/y }", false),
            (
                "{ path_regex: ^/x }",
                "{ path_regex: ^/x, methods: [GET] }",
                true,
            ),
            (
                "{ hosts: ['*.a.b'] }",
                "{ hosts: [X.a.B, '*.y.a.b'] }",
                true,
            ),
            ("{ hosts: ['*.a.b'] }", "{ hosts: [a.b] }", false),
            ("{ hosts: [a.b] }", "{ hosts: ['*.a.b'] }", false),
            ("{}", "{ scheme: http }", true),
            ("{ scheme: http }", "{}", false),
            ("{ scheme: http }", "{ scheme: https }", false),
            ("{ scheme: http }", "{ scheme: http, path: /x }", true),
            ("{ methods: [GET, HEAD] }", "{ methods: [GET] }", true),
            ("{ methods: [GET] }", "{ methods: [GET, PUT] }", false),
            (
                "{ headers: { a: '*' } }",
                "{ headers: { A: x, b: y } }",
                true,
            ),
            ("{ headers: { a: x } }", "{ headers: { a: '*' } }", false),
        ] {
            let found = route(first).includes(&route(second));
            assert_eq!(found, expected, "{first} before {second}");
        }
    }

    #[test]
    fn a_rewrite_may_name_the_groups_of_its_pattern() {
        for path in ["/user/${1}x", "/$id/$0", "/a$$b", "$1", "/a$-$"] {
            let yaml = format!(
                "{{ group: a, path_regex: '^/u/(?P<id>[0-9]+)', rewrite: {{ path: '{path}' }} }}"
            );
            route(&yaml).validate("routes[0]").unwrap();
        }
    }
}
