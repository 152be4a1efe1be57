//! Reading what is left of a request that has its response.

use std::time::Duration;

use ::pingora::proxy::Session;
use ::pingora::{Error, Result};
use http::header::CONTENT_LENGTH;
use tokio::time::{Instant, timeout, timeout_at};

use super::request_state::RequestState;

/// Fails if the client has left: what has waited for a place, and nobody waits for any more, is not to be done. Over
/// HTTP/1 a client that has not sent all of its request is found to have left only when the rest is read.
pub(super) async fn check_presence(session: &mut Session, state: &mut RequestState) -> Result<()> {
    if !state.is_complete && !session.is_http2() {
        return Ok(());
    }
    let next = session.read_body_or_idle(true);
    match timeout(Duration::ZERO, next).await {
        Ok(Err(error)) => {
            state.upstream = None;
            Err(error.into_down())
        }
        // It waits, or has sent its next request already.
        Ok(Ok(_)) | Err(_) => Ok(()),
    }
}

/// Ends when the client has left, as far as that is noticed: over HTTP/1 not before it has sent all of its request.
pub(super) async fn until_left(session: &mut Session, is_complete: bool) -> Box<Error> {
    if (is_complete || session.is_http2())
        && let Err(error) = session.read_body_or_idle(true).await
    {
        return error.into_down();
    }
    // It has sent its next request already.
    std::future::pending().await
}

/// How much of a body is looked for. As much finds room in what Pingora keeps of a body for further tries, from where it
/// sends it; each part has at most 16 KiB over HTTP/2.
const MOST_AT_HAND: u64 = 49_152;
const MOST_PARTS: usize = 3;
/// How long the rest of a request may be on its way. Streams wait for so long before they begin.
const SOON: Duration = Duration::from_millis(5);

/// Whether all that is left of a request is there, or soon, as with most calls of gRPC. What is there has been read then.
pub(super) async fn is_at_hand(session: &mut Session, state: &mut RequestState) -> bool {
    let length = session.req_header().headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let is_short = match length {
        Some(length) => length <= MOST_AT_HAND,
        // A part of HTTP/1 may have any size.
        None => session.is_http2(),
    };
    // An earlier try may have read as much as is kept; and nobody sends the body before it is asked for.
    if is_short && state.tries == 1 && !state.is_expecting {
        let parts = if length.is_some() {
            usize::MAX
        } else {
            MOST_PARTS
        };
        let soon = Instant::now() + SOON;
        session.as_mut().enable_retry_buffering();
        for _ in 0..parts {
            let read = timeout_at(soon, session.read_request_body()).await;
            if session.as_mut().is_body_done() || !matches!(read, Ok(Ok(Some(_)))) {
                break;
            }
        }
    }
    let is_done = session.as_mut().is_body_done();
    if is_done && session.body_bytes_read() == 0 {
        // Pingora takes it for a request without a body.
        state.completes();
    }
    is_done
}

/// Reads what is there of a body that nobody will get: if it is all, the client keeps its connection.
pub(super) async fn take_body_at_hand(session: &mut Session, state: &mut RequestState) {
    if state.connection.is_none() || state.is_complete || state.is_expecting {
        return;
    }
    // What is not there at once is not waited for.
    while let Ok(Ok(read)) = timeout(Duration::ZERO, session.read_request_body()).await {
        if read.is_none() {
            state.completes();
            return;
        }
    }
}

/// Reads what the client still sends of its request, after a response after which the connection ends. To close it
/// before would reset it, and take the response away from a client that has not read it yet.
/// Not for longer than this time.
pub(super) async fn read_rest(session: &mut Session, state: &RequestState, within: Duration) {
    let is_over = state.is_complete || state.is_tunnel || session.get_keepalive().is_some();
    let Some(connection) = state.connection.as_ref().filter(|_| !is_over) else {
        return;
    };
    connection.end_writing();
    let reading = async {
        while connection.ended().is_none()
            && matches!(session.read_request_body().await, Ok(Some(_)))
        {}
    };
    let _ = timeout(within, reading).await;
}
