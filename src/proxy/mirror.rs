//! Copies of requests for another group, whose responses nobody gets.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ::pingora::connectors::http::Connector;
use ::pingora::http::RequestHeader;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, HOST};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::group::GroupProxy;
use super::headers::LEADER_EPOCH;
use super::peers::Asked;
use crate::balance::{PickOptions, Probes};
use crate::config;
use crate::pingora::{exchange, shorten_error};

/// Copies of one route at one time. More are not sent: they must not hold what requests need.
const MOST_AT_ONCE: usize = 100;
/// A copy takes at most this long, whatever the group's times are.
const LONGEST: Duration = Duration::from_secs(60);

/// Where copies go.
pub(super) struct Mirror {
    group: Arc<GroupProxy>,
    part: f64,
    most_body: usize,
    places: Arc<Semaphore>,
    connector: Arc<Connector>,
}

/// A copy that grows as the request is received.
pub(super) struct Copy {
    mirror: Arc<Mirror>,
    head: RequestHeader,
    body: BytesMut,
    /// Its place among those at one time, from its first byte on.
    place: OwnedSemaphorePermit,
}

impl Mirror {
    /// What the file says, which has been checked; `None` if the group is missing.
    pub(super) fn new(
        config: &config::Mirror,
        groups: &BTreeMap<String, Arc<GroupProxy>>,
    ) -> Option<Self> {
        Some(Self {
            group: groups.get(&config.group)?.clone(),
            part: config.percent / 100.0,
            most_body: config.body_bytes,
            places: Arc::new(Semaphore::new(MOST_AT_ONCE)),
            connector: Arc::new(Connector::new(None)),
        })
    }

    /// The beginning of a copy, if this request is one to be copied.
    pub(super) fn begin(self: &Arc<Self>, request: &RequestHeader) -> Option<Copy> {
        let length = request.headers.get(CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > self.most_body) || fastrand::f64() >= self.part {
            return None;
        }
        let place = self.places.clone().try_acquire_owned().ok()?;
        let mut head = request.clone();
        // A token of another group would fence the leader of this one, and nobody waits for a 100.
        head.remove_header(&LEADER_EPOCH);
        head.remove_header(&EXPECT);
        if !head.headers.contains_key(HOST)
            && let Some(authority) = request.uri.authority()
        {
            head.insert_header(HOST, authority.as_str()).ok()?;
        }
        Some(Copy {
            mirror: self.clone(),
            head,
            body: BytesMut::new(),
            place,
        })
    }

    async fn send(&self, head: RequestHeader, body: Bytes) {
        // Nobody hears what becomes of a copy.
        let picked = self.group.balancer.pick_with(PickOptions {
            // Where keys decide, all of them get a part of the copies.
            key: &fastrand::u64(..).to_ne_bytes(),
            probes: Probes::No,
            ..PickOptions::default()
        });
        let Some(upstream) = picked else {
            return;
        };
        let overload = &self.group.picker.overload;
        if !overload.allows(upstream.in_flight()) {
            // Requests of clients are worth more.
            return;
        }
        let asked = Asked::default();
        let peer = self
            .group
            .peers
            .peer(upstream.addr(), &upstream.node(), asked);
        let sent = match &peer {
            Ok(peer) => {
                let message = (head, body);
                let sent = exchange(&self.connector, peer, message, 0, LONGEST).await;
                sent.map_err(|mut error| {
                    shorten_error(&mut error);
                    error.to_string()
                })
            }
            Err(reason) => Err((*reason).to_owned()),
        };
        drop(upstream);
        overload.freed();
        // Nothing is learned from it: it is not the same load as requests of clients are.
        if let Err(error) = sent {
            debug!(
                group = self.group.name,
                error, "a copy of a request was not answered"
            );
        }
    }
}

impl Copy {
    /// A part of the body; the copy is given up if it becomes too long.
    pub(super) fn add(mut self, part: Option<&Bytes>) -> Option<Self> {
        self.body.extend_from_slice(part.map_or(&[], |part| part));
        (self.body.len() <= self.mirror.most_body).then_some(self)
    }

    /// The request is complete, and so is its copy.
    pub(super) fn send(self) {
        tokio::spawn(async move {
            self.mirror.send(self.head, self.body.freeze()).await;
            drop(self.place);
        });
    }
}
