//! Which requests are for the leader, and finding it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use http::{HeaderName, Method, StatusCode};

use super::headers::LEADER_EPOCH;
use super::request_state::RequestState;
use super::unserved::Unserved;
use crate::config::{ClusterConfig, may_be_below, normalized};
use crate::ids::Revision;
use crate::pingora::{LeaderRoute, LeaderUpstream};

/// How long to wait for another leader before one that could not be reached is tried again; twice as long after each
/// further try.
const RETRY_SAME_AFTER: Duration = Duration::from_millis(200);
/// In so many pauses the whole wait is over, at the latest: Pingora allows 16 tries.
const MOST_PAUSES: u32 = 8;

/// On responses to writes, and on a client's reads after it: until when these go to the leader, in
/// milliseconds since 1970.
const READS_UNTIL: HeaderName = HeaderName::from_static("x-leader-reads-until");

/// Which requests are for the leader.
#[derive(Debug)]
pub(super) struct LeaderRequests {
    paths: Vec<String>,
    read_your_writes: Duration,
    pub(super) wait: Duration,
    /// Requests that wait for a leader.
    waiting: AtomicUsize,
}

/// More requests do not wait for a leader at one time: each of them keeps its connection and what it has sent.
const MOST_WAITING: usize = 10_000;

/// One of those that wait, until this is dropped.
pub(super) struct Waits<'a>(&'a AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl LeaderRequests {
    pub(super) fn new(config: &ClusterConfig) -> Self {
        let paths = config.leader.paths.iter();
        Self {
            paths: paths.map(|path| normalized(path).into_owned()).collect(),
            read_your_writes: Duration::from_millis(config.leader.read_your_writes_ms),
            wait: Duration::from_millis(config.leader_wait_ms),
            waiting: AtomicUsize::new(0),
        }
    }

    /// One more request waits for a leader; the error says why it may not.
    pub(super) fn waits(&self) -> Result<Waits<'_>, Unserved> {
        let waits = Waits(&self.waiting);
        match self.waiting.fetch_add(1, Ordering::Relaxed) {
            0..MOST_WAITING => Ok(waits),
            _ => Err(Unserved::TooManyWait),
        }
    }

    /// Whether a request is for the leader.
    pub(super) fn include(&self, session: &Session, is_upgrade: bool) -> bool {
        let request = session.req_header();
        // What comes through a tunnel is not known.
        LeaderRoute::is_write(&request.method)
            || is_upgrade
            || self.is_named(request.uri.path())
            || self.reads_own_write(session, now())
    }

    /// Whatever its spelling: nothing is lost if a leader gets what is for anybody.
    fn is_named(&self, path: &str) -> bool {
        if self.paths.is_empty() {
            return false;
        }
        self.paths.iter().any(|above| may_be_below(path, above))
    }

    /// Whether the client has written a short while ago. The time is the client's word, so it is
    /// believed only as far as it could come from here, or from another balancer with a clock that is as much ahead as
    /// the time is long.
    fn reads_own_write(&self, session: &Session, now: u64) -> bool {
        if self.read_your_writes.is_zero() {
            return false;
        }
        let value = session.get_header(&READS_UNTIL);
        let until = value.and_then(|value| value.to_str().ok()?.parse().ok());
        until.is_some_and(|until: u64| {
            let left = until.saturating_sub(now);
            left > 0 && u128::from(left) <= 2 * self.read_your_writes.as_millis()
        })
    }

    /// Tells a client that has written until when its reads go to the leader.
    pub(super) fn answer(
        &self,
        method: &Method,
        response: &mut ResponseHeader,
        leader: Option<&LeaderUpstream>,
    ) -> Result<()> {
        if leader.is_none() {
            return Ok(());
        }
        response.remove_header(&READS_UNTIL);
        // A redirection is what a form is answered with that has been taken.
        let is_taken = response.status.is_success() || response.status.is_redirection();
        let is_written = is_taken && LeaderRoute::is_write(method);
        if !is_written || self.read_your_writes.is_zero() {
            return Ok(());
        }
        let until = u128::from(now()) + self.read_your_writes.as_millis();
        response
            .insert_header(READS_UNTIL, until.to_string())
            .map(drop)
    }
}

/// The time in milliseconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Whether a node says that it does not lead any more, and has not done what it was asked for: by 421, or by another refusal
/// with a newer token. What has no side effects (`is_safe`) may have failed there.
pub(super) fn is_misdirected(response: &ResponseHeader, sent: Revision, is_safe: bool) -> bool {
    let newer = || {
        let token = response.headers.get(&LEADER_EPOCH);
        let token = token.and_then(|token| token.to_str().ok()?.parse::<i64>().ok());
        token.is_some_and(|token| token > sent)
    };
    let status = response.status;
    let is_refusal = status.is_client_error() || is_safe && status.is_server_error();
    status == StatusCode::MISDIRECTED_REQUEST || is_refusal && newer()
}

/// Finds the leader, waiting for at most as long as that is allowed: from the start of the request, or since a node has said
/// that it does not lead, whose successor is not to have less time because that node was slow. The error is the reason
/// why there is none.
pub(super) async fn find_leader(
    route: &LeaderRoute,
    requests: &LeaderRequests,
    context: &RequestState,
) -> Result<LeaderUpstream, Unserved> {
    let max_wait = requests.wait;
    let remaining = || {
        let since = context.misdirected.unwrap_or(context.started);
        let of_wait = max_wait.saturating_sub(since.elapsed());
        let left = context.time_left().unwrap_or(Some(Duration::ZERO));
        left.map_or(of_wait, |left| left.min(of_wait))
    };
    let now = route.leader();
    if let Some(leader) = now.filter(|leader| Some(leader.epoch) != context.failed_epoch) {
        return Ok(leader);
    }
    let _waits = requests.waits()?;
    // A leader that could not be reached may have crashed: its successor has another term. Or it
    // may be back in a moment. One that says that it does not lead will not be back.
    let patience = match context.failed_epoch {
        Some(_) if context.misdirected.is_none() => remaining().min(pause(context.tries, max_wait)),
        _ => remaining(),
    };
    let other = route
        .wait_for_other_than(context.failed_epoch, patience)
        .await;
    if let Some(leader) = other.or_else(|| route.leader()) {
        return Ok(leader);
    }
    let leader = route.wait(remaining()).await;
    leader.ok_or(Unserved::NoLeader)
}

/// The pause before the same leader is tried again, after so many tries.
fn pause(tries: usize, max_wait: Duration) -> Duration {
    let doubled = u32::try_from(tries.saturating_sub(1))
        .unwrap_or(u32::MAX)
        .min(16);
    let longest = (max_wait / MOST_PAUSES).max(RETRY_SAME_AFTER);
    (RETRY_SAME_AFTER * (1 << doubled)).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pauses_of_fewer_tries_than_pingora_allows_last_for_the_whole_wait() {
        for seconds in [0, 1, 2, 3, 15, 60] {
            let wait = Duration::from_secs(seconds);
            let pauses = || (1..16).map(|tries| pause(tries, wait));
            assert!(pauses().sum::<Duration>() >= wait, "{seconds}");
            assert_eq!(pauses().next(), Some(RETRY_SAME_AFTER));
            assert!(pauses().all(|pause| pause <= (wait / 8).max(RETRY_SAME_AFTER)));
        }
    }

    #[test]
    fn so_many_wait_for_a_leader_and_no_more() {
        let text = "cluster: { group: g, listen: '127.0.0.1:80', etcd: { endpoints: ['h:1'] } }";
        let config = ClusterConfig::from_yaml(text, "test").unwrap();
        let requests = LeaderRequests::new(&config);
        let all: Vec<_> = (0..MOST_WAITING).map(|_| requests.waits()).collect();
        assert!(all.iter().all(Result::is_ok));
        assert!(requests.waits().is_err());
        drop(all);
        assert!(requests.waits().is_ok());
    }

    #[test]
    fn a_refusal_with_a_newer_token_is_misdirected() {
        for (status, token, expected) in [
            (421, None, true),
            (409, Some("8"), true),
            (409, Some("7"), false),
            (409, None, false),
            (200, Some("8"), false),
            (500, Some("8"), false),
            (409, Some("x"), false),
        ] {
            let mut response = ResponseHeader::build(status, None).unwrap();
            if let Some(token) = token {
                response.insert_header(LEADER_EPOCH, token).unwrap();
            }
            let is = |is_safe| is_misdirected(&response, 7, is_safe);
            assert_eq!(is(false), expected, "{status} {token:?}");
            let is_failure = (status, token) == (500, Some("8"));
            assert_eq!(is(true), expected || is_failure, "{status} {token:?}");
        }
    }
}
