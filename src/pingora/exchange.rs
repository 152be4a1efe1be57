//! Requests to backends that no client waits for: copies, and health checks.

use std::time::{Duration, Instant};

use ::pingora::ErrorType::{InternalError, InvalidHTTPHeader, ReadTimedout};
use ::pingora::connectors::http::Connector;
use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::protocols::http::client::HttpSession;
use ::pingora::upstreams::peer::{HttpPeer, Peer};
use ::pingora::{Error, OkOrErr, OrErr, Result};
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode, Uri, Version};
use tokio::time::timeout;

/// A response, and as much of its body as was asked for.
pub(crate) struct Exchanged {
    pub(crate) head: ResponseHeader,
    pub(crate) body: BytesMut,
    /// Over HTTP/2 only.
    pub(crate) trailers: Option<HeaderMap>,
}

/// Sends a request with a body that is there as a whole, and reads the response to its end, all within this time. Up
/// to `keep` bytes of its body are kept. `head` names the host in the field `Host`.
pub(crate) async fn exchange(
    connector: &Connector,
    peer: &HttpPeer,
    message: (RequestHeader, Bytes),
    keep: usize,
    within: Duration,
) -> Result<Exchanged> {
    let start = Instant::now();
    let late = || Error::explain(ReadTimedout, format!("no answer within {within:?}"));
    let connecting = timeout(within, connector.get_http_session(peer));
    let (mut session, _) = connecting.await.map_err(|_| late())??;
    let left = within.saturating_sub(start.elapsed());
    let talking = timeout(left, talk(&mut session, peer, message, keep));
    let talked = talking.await.unwrap_or_else(|_| Err(late()));
    if let (Err(error), HttpSession::H2(session)) = (&talked, &session)
        && error.etype() == &ReadTimedout
    {
        // It may hang: nobody else is to use it.
        session.conn.mark_shutdown();
    }
    // Pingora keeps a connection of HTTP/2 that has room for others until it is told, also when it is over.
    if talked.is_ok() || matches!(session, HttpSession::H2(_)) {
        let idle = peer.options.idle_timeout;
        connector.release_http_session(session, peer, idle).await;
    }
    talked
}

async fn talk(
    session: &mut HttpSession,
    peer: &HttpPeer,
    (mut head, body): (RequestHeader, Bytes),
    keep: usize,
) -> Result<Exchanged> {
    head.remove_header(&TRANSFER_ENCODING);
    head.remove_header(&CONTENT_LENGTH);
    if !body.is_empty() {
        head.insert_header(CONTENT_LENGTH, body.len())?;
    }
    match session {
        HttpSession::H2(_) => for_http_2(&mut head, peer.tls())?,
        _ => head.set_version(Version::HTTP_11),
    }
    session.set_read_timeout(peer.options.read_timeout);
    session.write_request_header(Box::new(head)).await?;
    if !body.is_empty() {
        session.write_request_body(body, true).await?;
    }
    session.finish_request_body().await?;
    loop {
        session.read_response_header().await?;
        let status = session.response_header().map(|head| head.status);
        match status {
            // Nobody has asked for another protocol.
            Some(StatusCode::SWITCHING_PROTOCOLS) => {
                return Error::e_explain(InvalidHTTPHeader, "the protocol was switched");
            }
            Some(status) if status.is_informational() => {}
            _ => break,
        }
    }
    if let HttpSession::H1(session) = session {
        session.respect_keepalive();
    }
    let head = session.response_header().cloned();
    let head = head.or_err(InternalError, "a response without a head")?;
    let mut kept = BytesMut::new();
    while let Some(part) = session.read_response_body().await? {
        let room = keep.saturating_sub(kept.len());
        kept.extend_from_slice(&part[..room.min(part.len())]);
    }
    let trailers = match session {
        HttpSession::H2(session) => session.read_trailers().await?,
        _ => None,
    };
    Ok(Exchanged {
        head,
        body: kept,
        trailers,
    })
}

/// Over HTTP/2 the host is a part of the address.
fn for_http_2(head: &mut RequestHeader, is_tls: bool) -> Result<()> {
    let host = head.remove_header(&HOST);
    let host = host.or_err(InvalidHTTPHeader, "a request without a host")?;
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let uri = Uri::builder()
        .scheme(if is_tls { "https" } else { "http" })
        .authority(host.as_bytes())
        .path_and_query(path)
        .build();
    head.set_uri(uri.or_err(InvalidHTTPHeader, "the host or the path")?);
    head.set_version(Version::HTTP_2);
    Ok(())
}
