//! Picking a backend for a request.

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::Instant;

use ::pingora::Result;
use ::pingora::proxy::Session;
use http::HeaderValue;

use super::context::RequestContext;
use super::reply::unavailable;
use crate::balance::{Balancer, PickOptions, Upstream};
use crate::config::HashOn;

/// What the policy `consistent` hashes of a request.
fn hash_key<'s>(hash_on: &HashOn, session: &'s Session, client: Option<IpAddr>) -> Cow<'s, [u8]> {
    match hash_on {
        HashOn::ClientIp => match client {
            Some(client) => Cow::Owned(client.to_string().into_bytes()),
            None => Cow::Borrowed(&[]),
        },
        HashOn::Uri => {
            let uri = session.req_header().uri.path_and_query();
            Cow::Borrowed(uri.map_or(&[], |uri| uri.as_str().as_bytes()))
        }
        HashOn::Header(name) => {
            let value = session.get_header(name);
            Cow::Borrowed(value.map_or(&[], HeaderValue::as_bytes))
        }
    }
}

/// Picks a backend that has not been tried yet, and stores it in the context. `hash_on` is for a policy
/// that hashes.
pub(super) fn pick<'c>(
    balancer: &Balancer,
    hash_on: Option<&HashOn>,
    session: &Session,
    context: &'c mut RequestContext,
) -> Result<&'c Upstream> {
    // The backend that failed is not busy with this request any more.
    context.upstream = None;
    let key = match hash_on {
        Some(hash_on) => hash_key(hash_on, session, context.client),
        None => Cow::Borrowed(&[][..]),
    };
    let now = Instant::now();
    context.sent = now;
    context.answered = None;
    let options = PickOptions {
        key: &key,
        exclude: &context.tried,
        now: Some(now),
        random: None,
    };
    let Some(upstream) = balancer.pick_with(options) else {
        return Err(unavailable(if context.tried.is_empty() {
            "no backend is registered"
        } else {
            "every backend has been tried"
        }));
    };
    context.tried.push(upstream.addr());
    Ok(context.upstream.insert(upstream))
}
