//! A route: which requests it is for, and what becomes of them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ::pingora::ErrorType::InternalError;
use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::{OrErr, Result};
use bytes::Bytes;
use http::Uri;
use http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH,
    CONTENT_LOCATION, CONTENT_RANGE, CONTENT_TYPE, ETAG, EXPIRES, HOST, LAST_MODIFIED, LOCATION,
};

use super::conditions::{Conditions, host_of};
use super::group::{GroupProxy, some_time};
use super::header_changes::HeaderChanges;
use super::mirror::Mirror;
use super::peers::BackendTimes;
use super::request_state::RequestState;
use crate::config;

/// A route, ready to be used.
pub(super) struct Route {
    pub(super) name: String,
    conditions: Conditions,
    action: Action,
    /// All requests are for the leader.
    is_for_leader: bool,
    retries: Option<usize>,
    /// `Some(None)` is any time.
    request_timeout: Option<Option<Duration>>,
    times: BackendTimes,
    rewrite: config::Rewrite,
    request_headers: HeaderChanges,
    response_headers: HeaderChanges,
    pub(super) mirror: Option<Arc<Mirror>>,
    requests: Arc<AtomicU64>,
}

/// What becomes of a request.
enum Action {
    Serve(Split),
    Redirect(config::Redirect),
    Answer(config::Answer),
}

/// Groups by weight.
struct Split {
    /// Each with its weight.
    groups: Vec<(u64, Arc<GroupProxy>)>,
    last: Arc<GroupProxy>,
}

/// What a request gets.
pub(super) enum Decided {
    Serve(Arc<GroupProxy>),
    /// This response, without a backend.
    Answer(Box<ResponseHeader>, Bytes),
}

impl Split {
    fn new(config: &config::Route, groups: &BTreeMap<String, Arc<GroupProxy>>) -> Option<Self> {
        let one = config.group.iter().map(|name| (name, 1));
        let several = config.split.iter().map(|(name, weight)| (name, *weight));
        let groups: Vec<_> = one
            .chain(several)
            .filter(|(_, weight)| *weight > 0)
            .filter_map(|(name, weight)| Some((u64::from(weight), groups.get(name)?.clone())))
            .collect();
        let last = groups.last()?.1.clone();
        Some(Self { groups, last })
    }

    /// A group, by weight; of those that have nodes, if any has: a canary that is not there gets nothing.
    fn draw(&self) -> &Arc<GroupProxy> {
        let [_, _, ..] = &self.groups[..] else {
            return &self.last;
        };
        let there = || {
            let groups = self.groups.iter();
            groups.filter(|(_, group)| !group.balancer.is_empty())
        };
        let total: u64 = there().map(|(weight, _)| weight).sum();
        let mut at = match total {
            0 => return &self.last,
            total => fastrand::u64(..total),
        };
        for (weight, group) in there() {
            if at < *weight {
                return group;
            }
            at -= weight;
        }
        // One has got its first node, or lost its last one, meanwhile.
        &self.last
    }
}

impl Route {
    /// What the file says, which has been checked; `None` if a group is missing. `number` counts from 1.
    pub(super) fn new(
        config: &config::Route,
        number: usize,
        groups: &BTreeMap<String, Arc<GroupProxy>>,
    ) -> Option<Self> {
        let action = match (&config.redirect, &config.answer) {
            (Some(redirect), _) => Action::Redirect(redirect.clone()),
            (None, Some(answer)) => Action::Answer(answer.clone()),
            (None, None) => Action::Serve(Split::new(config, groups)?),
        };
        let name = config.name.clone();
        Some(Self {
            name: name.unwrap_or_else(|| format!("route-{number}")),
            conditions: Conditions::new(config),
            action,
            is_for_leader: config.leader,
            retries: config.retries,
            request_timeout: config.timeouts.request_ms.map(some_time),
            times: BackendTimes {
                response: config.timeouts.response_ms.and_then(some_time),
                read: config.timeouts.read_ms.and_then(some_time),
                tunnel: config.timeouts.tunnel_ms.and_then(some_time),
            },
            rewrite: config.rewrite.clone(),
            request_headers: HeaderChanges::new(&config.request_headers),
            response_headers: HeaderChanges::new(&config.response_headers),
            mirror: match &config.mirror {
                Some(mirror) => Some(Arc::new(Mirror::new(mirror, groups)?)),
                None => None,
            },
            requests: Arc::default(),
        })
    }

    /// Whether it is for the same requests.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        format!("{:?}", self.conditions) == format!("{:?}", other.conditions)
    }

    /// Continues to count where the same route is.
    pub(super) fn count_with(&mut self, former: &Self) {
        self.requests = former.requests.clone();
    }

    /// How many requests it has been for.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether it is for this request, which came over TLS or not.
    pub(super) fn is_for(
        &self,
        request: &RequestHeader,
        is_over_tls: impl FnOnce() -> bool,
    ) -> bool {
        self.conditions.are_met_by(request, is_over_tls)
    }

    /// What becomes of this request, which the route is for.
    pub(super) fn decide(&self, request: &RequestHeader) -> Result<Decided> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (mut head, body) = match &self.action {
            Action::Serve(split) => return Ok(Decided::Serve(split.draw().clone())),
            Action::Redirect(redirect) => {
                let mut head = ResponseHeader::build(redirect.status, Some(4))?;
                head.insert_header(LOCATION, location(&redirect.to, request))?;
                (head, Bytes::new())
            }
            Action::Answer(answer) => {
                let mut head = ResponseHeader::build(answer.status, Some(4))?;
                head.insert_header(CONTENT_TYPE, answer.content_type.as_str())?;
                (head, Bytes::copy_from_slice(answer.body.as_bytes()))
            }
        };
        if !matches!(head.status.as_u16(), 204 | 304) {
            head.insert_header(CONTENT_LENGTH, body.len())?;
        }
        self.response_headers.change_response(&mut head)?;
        Ok(Decided::Answer(Box::new(head), body))
    }

    /// What the route says instead of the group.
    pub(super) fn apply_to(&self, state: &mut RequestState) {
        state.is_for_leader |= self.is_for_leader;
        state.most_retries = self.retries.unwrap_or(state.most_retries);
        state.timeout = self.request_timeout.unwrap_or(state.timeout);
        state.times = self.times;
    }

    /// Changes what the backend gets.
    pub(super) fn change_request(&self, request: &mut RequestHeader) -> Result<()> {
        if let Some(instead) = &self.rewrite.path {
            let path = self.conditions.rewritten(request.uri.path(), instead);
            let target = match request.uri.query() {
                Some(query) => format!("{path}?{query}"),
                None => path,
            };
            // Over HTTP/2 the host stands there, too.
            let mut parts = request.uri.clone().into_parts();
            let failed = "the path after the rewrite";
            parts.path_and_query = Some(target.parse().or_err(InternalError, failed)?);
            request.set_uri(Uri::from_parts(parts).or_err(InternalError, failed)?);
        }
        if let Some(host) = &self.rewrite.host {
            request.insert_header(HOST, host.as_str())?;
        }
        self.request_headers.change_request(request)
    }

    /// Changes what the client gets.
    pub(super) fn change_response(&self, response: &mut ResponseHeader) -> Result<()> {
        self.response_headers.change_response(response)
    }

    /// Changes what the client gets instead of an answer: without what the route says of the content of answers, and
    /// of how long they may be kept.
    pub(super) fn change_error(&self, response: &mut ResponseHeader) -> Result<()> {
        self.response_headers.change_response(response)?;
        for name in [
            CACHE_CONTROL,
            CONTENT_DISPOSITION,
            CONTENT_ENCODING,
            CONTENT_LANGUAGE,
            CONTENT_LOCATION,
            CONTENT_RANGE,
            ETAG,
            EXPIRES,
            LAST_MODIFIED,
        ] {
            response.remove_header(&name);
        }
        Ok(())
    }
}

fn location(to: &str, request: &RequestHeader) -> String {
    let mut location = String::new();
    let mut rest = to;
    while let Some((before, after)) = rest.split_once('{') {
        location.push_str(before);
        let (name, after) = after.split_once('}').unwrap_or((after, ""));
        match (name, request.uri.query()) {
            ("host", _) => match host_of(request).unwrap_or_default() {
                address if address.contains(':') => {
                    location.push_str(&format!("[{address}]"));
                }
                host => location.push_str(host),
            },
            ("path", _) => location.push_str(request.uri.path()),
            ("query", Some(query)) => {
                location.push('?');
                location.push_str(query);
            }
            _ => {}
        }
        rest = after;
    }
    location.push_str(rest);
    // Two slashes at the start are followed by the name of a host, which is not for the client to choose.
    match location.trim_start_matches(['/', '\\']) {
        path if !to.starts_with("//") && path.len() + 1 < location.len() => format!("/{path}"),
        _ => location,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_names_what_was_asked_for() {
        let mut request = RequestHeader::build("GET", b"/a/{query}?x=1", None).unwrap();
        request.insert_header(HOST, "example.com:80").unwrap();
        for (to, expected) in [
            (
                "https://{host}{path}{query}",
                "https://example.com/a/{query}?x=1",
            ),
            ("https://other/{path}", "https://other//a/{query}"),
            ("/there", "/there"),
            ("{path}/", "/a/{query}/"),
        ] {
            assert_eq!(location(to, &request), expected);
        }
        // Another host than the one that is asked for would be an open redirect.
        let mut request = RequestHeader::build("GET", b"//evil.example/a", None).unwrap();
        request.insert_header(HOST, "[2001:db8::1]:80").unwrap();
        for (to, expected) in [
            ("{path}/", "/evil.example/a/"),
            ("/{path}", "/evil.example/a"),
            ("//here{path}", "//here//evil.example/a"),
            (
                "https://{host}{path}",
                "https://[2001:db8::1]//evil.example/a",
            ),
        ] {
            assert_eq!(location(to, &request), expected);
        }
        let request = RequestHeader::build("GET", b"/", None).unwrap();
        for (to, expected) in [
            ("https://{host}{path}{query}", "https:///"),
            ("{path}/index.html", "/index.html"),
            ("{path}/", "/"),
            ("{path}", "/"),
            ("/", "/"),
        ] {
            assert_eq!(location(to, &request), expected);
        }
    }
}
