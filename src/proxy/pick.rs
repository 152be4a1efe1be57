//! Picking a backend for a request.

use std::borrow::Cow;
use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use http::HeaderValue;

use super::client::{TrustedProxies, is_claim};
use super::overload::Overload;
use super::request_state::RequestState;
use super::sticky;
use super::unserved::Unserved;
use crate::balance::{PickOptions, Policy, Probes, Upstream};
use crate::config::{ClusterConfig, HashOn};
use crate::pingora::BalancerService;

/// How often another backend is looked for, because one has as many requests as it may have.
const MOST_FULL: usize = 32;
/// After so many, a process that uses a part of the backends looks at others, too.
const FEW_FULL: usize = 3;

/// How backends are picked, beyond the policy.
#[derive(Debug)]
pub(super) struct Picker {
    /// `None` for a policy that does not hash.
    hash_on: Option<HashOn>,
    sticky_cookie: Option<String>,
    default_port: u16,
    pub(super) overload: Arc<Overload>,
}

/// Why nothing was picked.
enum Nothing {
    /// There is no backend, or no other than those that have been tried.
    Left,
    /// Each of them has as many requests as it may have.
    Full,
}

impl Picker {
    pub(super) fn new(config: &ClusterConfig) -> Self {
        Self {
            hash_on: (config.policy == Policy::Consistent).then(|| config.hash_on.clone()),
            sticky_cookie: config.sticky_cookie.clone(),
            default_port: config.default_port,
            overload: Arc::new(Overload::new(&config.overload)),
        }
    }

    /// Picks a backend that has not been tried yet, and stores it in the context. The error is why there
    /// is none.
    pub(super) async fn pick(
        &self,
        balancer: &BalancerService,
        session: &Session,
        context: &mut RequestState,
    ) -> Result<(), Unserved> {
        // The backend that failed is not busy with this request any more.
        context.upstream = None;
        let mut now = Instant::now();
        // Whoever waits comes first.
        let mut picked = match self.overload.some_wait_for_backend() {
            true => Err(Nothing::Full),
            false => self.pick_now(balancer, session, context, now),
        };
        if matches!(picked, Err(Nothing::Full)) {
            let again = || {
                now = Instant::now();
                match self.pick_now(balancer, session, context, now) {
                    Err(Nothing::Full) => None,
                    other => Some(other),
                }
            };
            let left = context.time_left().unwrap_or(Some(Duration::ZERO));
            let waited = self
                .overload
                .wait_for_backend(left, context.tried.is_empty(), again)
                .await;
            picked = waited.unwrap_or(picked);
        }
        let upstream = picked.map_err(|nothing| match nothing {
            Nothing::Full => Unserved::BackendsFull,
            Nothing::Left if context.tried.is_empty() => Unserved::NoBackend,
            Nothing::Left => Unserved::AllTried,
        })?;
        context.begins_try(now);
        context.tried.push(upstream.addr());
        context.upstream = Some(upstream);
        Ok(())
    }

    /// What `look` finds of a leader, once that may have one more request, or is not known as a backend. `None` if it has
    /// no room in time.
    pub(super) async fn with_room<T>(
        &self,
        look: impl Fn() -> (T, Option<Upstream>),
        context: &RequestState,
    ) -> Option<(T, Option<Upstream>)> {
        let take = || {
            let found = look();
            let in_flight = found.1.as_ref().map_or(0, Upstream::in_flight);
            self.overload.allows(in_flight).then_some(found)
        };
        let at_once = match self.overload.some_wait_for_leader() {
            true => None,
            false => take(),
        };
        match at_once {
            Some(found) => Some(found),
            None => {
                let left = context.time_left().unwrap_or(Some(Duration::ZERO));
                self.overload.wait_for_leader(left, take).await
            }
        }
    }

    fn pick_now(
        &self,
        balancer: &BalancerService,
        session: &Session,
        context: &RequestState,
        now: Instant,
    ) -> Result<Upstream, Nothing> {
        let paused = self.overload.paused(now, || balancer.working());
        if let Some(upstream) = self.named_by_cookie(balancer, session, context, &paused) {
            return Ok(upstream);
        }
        let key = match &self.hash_on {
            Some(hash_on) => hash_key(hash_on, session, context.client),
            None => Cow::Borrowed(&[][..]),
        };
        let is_repeatable = session.req_header().method.is_safe() && context.may_try();
        let probes = match (context.tried.is_empty(), is_repeatable) {
            (true, true) if !context.is_upgrade => Probes::Yes,
            (true, _) => Probes::IfNoOther,
            (false, _) => Probes::No,
        };
        let some_full = Cell::new(false);
        let pick = |exclude: &[SocketAddr], only_working: bool| {
            balancer.pick_with(PickOptions {
                key: &key,
                exclude,
                only_working,
                some_full: some_full.get(),
                probes,
                for_tunnel: context.is_upgrade,
                now: Some(now),
                random: None,
            })
        };
        let first = match paused.is_empty() {
            true => pick(&context.tried, false),
            // While there is nobody else that works, a pause helps nobody.
            false => pick(&[&context.tried[..], &paused].concat(), true)
                .or_else(|| pick(&context.tried, false)),
        };
        let mut upstream = first.ok_or(Nothing::Left)?;
        if self.overload.allows(upstream.in_flight()) {
            return Ok(upstream);
        }
        let mut exclude = [&context.tried[..], &paused].concat();
        for full in 0..MOST_FULL {
            some_full.set(full >= FEW_FULL);
            exclude.push(upstream.addr());
            upstream = pick(&exclude, true).ok_or(Nothing::Full)?;
            if self.overload.allows(upstream.in_flight()) {
                return Ok(upstream);
            }
        }
        Err(Nothing::Full)
    }

    /// Whether the keys are values of a field that a client may have no right to.
    pub(super) fn hashes_claim(&self) -> bool {
        matches!(&self.hash_on, Some(HashOn::Header(name)) if is_claim(name.as_str()))
    }

    /// The backend that the client's cookie names, while it takes requests and works.
    fn named_by_cookie(
        &self,
        balancer: &BalancerService,
        session: &Session,
        context: &RequestState,
        paused: &[SocketAddr],
    ) -> Option<Upstream> {
        let name = self.sticky_cookie.as_deref()?;
        let addr = self.working_at(balancer, &sticky::node_of(session, name)?)?;
        if context.tried.contains(&addr) || paused.contains(&addr) {
            return None;
        }
        let upstream = balancer.upstream_at(addr)?;
        self.overload
            .allows(upstream.in_flight())
            .then_some(upstream)
    }

    /// The address of a node that takes requests and works.
    fn working_at(&self, balancer: &BalancerService, id: &str) -> Option<SocketAddr> {
        let addr = balancer
            .discovery()
            .nodes()
            .get(id)?
            .addr(self.default_port);
        balancer.works_at(addr).then_some(addr)
    }

    /// Names the node in the client's cookie, unless that names another one that works: it has had no room, or has
    /// failed one request, and knows the client nevertheless.
    pub(super) fn set_cookie(
        &self,
        balancer: &BalancerService,
        (session, response): (&Session, &mut ResponseHeader),
        context: &RequestState,
        trusted: &TrustedProxies,
    ) -> Result<()> {
        let (Some(name), Some(upstream)) = (&self.sticky_cookie, &context.upstream) else {
            return Ok(());
        };
        let id = &upstream.node().id;
        match sticky::node_of(session, name) {
            Some(named) if named == *id => Ok(()),
            Some(named) if self.working_at(balancer, &named).is_some() => Ok(()),
            _ => sticky::set_cookie(response, name, id, trusted.is_over_tls(session)),
        }
    }
}

/// What the policy `consistent` hashes of a request: the client's address, if it has nothing else, because all of these
/// would be for one backend.
fn hash_key<'s>(hash_on: &HashOn, session: &'s Session, client: Option<IpAddr>) -> Cow<'s, [u8]> {
    let request = session.req_header();
    let named = match hash_on {
        HashOn::ClientIp => None,
        HashOn::Uri => request
            .uri
            .path_and_query()
            .map(|uri| uri.as_str().as_bytes()),
        HashOn::Header(name) => session.get_header(name).map(first),
        HashOn::Cookie(name) => sticky::cookie(session, name),
        HashOn::Query(name) => {
            let parameter = request.uri.query().and_then(|query| parameter(query, name));
            parameter.map(str::as_bytes)
        }
    };
    match (named.filter(|named| !named.is_empty()), client) {
        (Some(named), _) => Cow::Borrowed(named),
        (None, Some(client)) => Cow::Owned(client.to_string().into_bytes()),
        (None, None) => Cow::Borrowed(&[]),
    }
}

/// The first value of a field that may be a list.
fn first(value: &HeaderValue) -> &[u8] {
    let value = value.as_bytes();
    let end = value.iter().position(|byte| *byte == b',');
    value[..end.unwrap_or(value.len())].trim_ascii()
}

fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_first_of_their_kind() {
        let value = |text| HeaderValue::from_static(text);
        assert_eq!(first(&value(" a , b")), b"a");
        assert_eq!(first(&value("")), b"");
        assert_eq!(parameter("x=1&user=7&user=8", "user"), Some("7"));
        assert_eq!(parameter("user", "user"), Some(""));
        assert_eq!(parameter("users=1", "user"), None);
    }
}
