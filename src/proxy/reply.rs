//! Which error response a client gets, and sending it.

use ::pingora::http::ResponseHeader;
use ::pingora::protocols::http::HttpTask;
use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource, ErrorType, Result};
use bytes::Bytes;
use http::Method;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};

use super::front::Ended;
use super::grpc::{Call, status_of};
use super::request_state::RequestState;
use super::route::Route;

/// An error response, with its reason in plain text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reply<'a> {
    pub(super) code: u16,
    reason: &'a str,
}

/// 503 with this reason.
pub(super) fn unavailable(reason: &'static str) -> Box<Error> {
    refused(503, reason)
}

/// 502 with this reason.
pub(super) fn bad_gateway(reason: &'static str) -> Box<Error> {
    refused(502, reason)
}

/// This status, with this reason.
pub(super) fn refused(code: u16, reason: &'static str) -> Box<Error> {
    Error::explain(ErrorType::HTTPStatus(code), reason)
}

/// The response to a client that did not send its request in time; `None` if that is not the reason.
pub(super) fn timed_out(context: &RequestState, error: &Error) -> Option<Reply<'static>> {
    if context.take_unanswered() {
        // Before there was a backend to wait for.
        return Some(Reply {
            code: 504,
            reason: "the request took too long",
        });
    }
    let connection = context.connection.as_ref();
    let by_front =
        connection.is_some_and(|connection| connection.ended() == Some(Ended::ReadTimeout));
    let by_backend = is_slow_upload(context, error);
    if by_backend && context.is_expecting {
        // Nobody is to blame: not every backend says `100 Continue`, and not every client goes on without it.
        return Some(Reply {
            code: 504,
            reason: "the backend did not ask for the rest of the request",
        });
    }
    (by_front || by_backend).then_some(Reply {
        code: 408,
        reason: "the request did not arrive in time",
    })
}

/// Whether a backend only waited because the client has not sent the rest of its request.
pub(super) fn is_slow_upload(context: &RequestState, error: &Error) -> bool {
    !context.is_complete && is_late(error)
}

/// Whether a backend had less than its time after the last byte of a request. Over HTTP/2 Pingora counts the time from
/// the head of the request on, so that little of it may be left after a long upload.
pub(super) fn had_little_time(context: &RequestState, error: &Error) -> bool {
    let is_early = || context.sent.elapsed() < context.silence_now() * 9 / 10;
    is_late(error) && (!context.is_complete || is_early())
}

fn is_late(error: &Error) -> bool {
    error.esource() == &ErrorSource::Upstream && error.etype() == &ErrorType::ReadTimedout
}

/// The response to an error; `None` if the client is gone. `leader_failed` means that a leader could
/// not be reached.
pub(super) fn reply_to(error: &Error, leader_failed: bool) -> Option<Reply<'_>> {
    let (code, reason) = match (error.etype(), error.esource()) {
        (etype, _) if leader_failed && is_connect_error(etype) => {
            (503, "the leader cannot be reached")
        }
        (ErrorType::HTTPStatus(code), _) => {
            let reason = error.context.as_ref().map(pingora::ImmutStr::as_str);
            (*code, reason.unwrap_or("the request cannot be proxied"))
        }
        (
            ErrorType::ConnectTimedout | ErrorType::ReadTimedout | ErrorType::WriteTimedout,
            ErrorSource::Upstream,
        ) => (504, "the backend did not answer in time"),
        (_, ErrorSource::Upstream) => (502, "the backend failed"),
        (
            ErrorType::WriteError | ErrorType::ReadError | ErrorType::ConnectionClosed,
            ErrorSource::Downstream,
        ) => return None,
        (_, ErrorSource::Downstream) => (400, "bad request"),
        (_, ErrorSource::Internal | ErrorSource::Unset) => (500, "internal error"),
    };
    Some(Reply { code, reason })
}

fn is_connect_error(etype: &ErrorType) -> bool {
    matches!(
        etype,
        ErrorType::ConnectTimedout
            | ErrorType::ConnectRefused
            | ErrorType::ConnectNoRoute
            | ErrorType::ConnectError
            | ErrorType::SocketError
    )
}

/// Whether this process is to get requests.
pub(super) fn readiness(is_ready: bool) -> Reply<'static> {
    match is_ready {
        true => Reply {
            code: 200,
            reason: "ready",
        },
        false => unavailable_reply("not ready"),
    }
}

/// No group is there for a request that has got this far.
pub(super) fn no_group() -> Box<Error> {
    unavailable("no group serves this request")
}

/// 503 with this reason, as a response.
pub(super) fn unavailable_reply(reason: &str) -> Reply<'_> {
    Reply { code: 503, reason }
}

/// Whether the client expects a status of gRPC; over HTTP/1 it could not be a client of gRPC.
fn is_call(session: &Session) -> bool {
    session.is_http2() && Call::of(&session.req_header().headers).is_some()
}

/// Sends a response for which no backend has been used. The client's connection stays.
pub(super) async fn respond(
    session: &mut Session,
    head: Box<ResponseHeader>,
    body: Bytes,
) -> Result<()> {
    // Over HTTP/2, nobody else leaves out what is not to follow, nor says that there is nothing.
    let is_whole = body.is_empty() || session.req_header().method == Method::HEAD;
    if is_whole && session.is_http2() {
        // The head itself ends the stream: clients of gRPC take a status for one only there, or in trailers.
        let head = HttpTask::Header(head, true);
        return session.write_response_tasks(vec![head]).await.map(drop);
    }
    session.write_response_header(head, is_whole).await?;
    let body = (!is_whole).then_some(body);
    session.write_response_body(body, true).await
}

impl Reply<'_> {
    /// Sends the response to a request of this route, if there is one, and ends the client's connection.
    pub(super) async fn send(&self, session: &mut Session, route: Option<&Route>) -> Result<()> {
        if is_call(session) {
            return self.send_status(session, route).await;
        }
        let (head, body) = self.parts(route)?;
        session.set_keepalive(None);
        respond(session, Box::new(head), body).await
    }

    /// Sends the response to a request for which no backend has been used. The client's connection
    /// stays.
    pub(super) async fn answer(&self, session: &mut Session, route: Option<&Route>) -> Result<()> {
        if is_call(session) {
            return self.send_status(session, route).await;
        }
        let (head, body) = self.parts(route)?;
        respond(session, Box::new(head), body).await
    }

    /// Sends the response to a call of gRPC: its status is in the head, and there is nothing else.
    async fn send_status(&self, session: &mut Session, route: Option<&Route>) -> Result<()> {
        let mut response = ResponseHeader::build(200, Some(4))?;
        if let Some(route) = route {
            route.change_error(&mut response)?;
        }
        response.insert_header(CONTENT_TYPE, "application/grpc")?;
        response.insert_header("grpc-status", status_of(self.code))?;
        // The reasons are plain words, which need no encoding.
        response.insert_header("grpc-message", self.reason)?;
        respond(session, Box::new(response), Bytes::new()).await
    }

    /// Head and body. Pages of other origins read no error without the fields that the route adds.
    fn parts(&self, route: Option<&Route>) -> Result<(ResponseHeader, Bytes)> {
        let body = Bytes::from(format!("{}\n", self.reason));
        let mut response = ResponseHeader::build(self.code, Some(4))?;
        if self.code == 503 {
            response.insert_header(RETRY_AFTER, "1")?;
        }
        if let Some(route) = route {
            route.change_error(&mut response)?;
        }
        response.insert_header(CONTENT_TYPE, "text/plain; charset=utf-8")?;
        response.insert_header(CONTENT_LENGTH, body.len())?;
        Ok((response, body))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::connections::Silence;
    use super::*;

    #[test]
    fn each_error_has_its_response() {
        use ErrorType::{
            ConnectRefused, ConnectTimedout, InternalError, ReadError, ReadTimedout, WriteTimedout,
        };
        let code = |error: Box<Error>, leader_failed| {
            reply_to(&error, leader_failed).map(|reply| reply.code)
        };
        assert_eq!(code(Error::new_up(ConnectRefused), true), Some(503));
        assert_eq!(code(Error::new_up(ConnectRefused), false), Some(502));
        assert_eq!(code(Error::new_up(ConnectTimedout), false), Some(504));
        assert_eq!(code(Error::new_up(ReadTimedout), true), Some(504));
        assert_eq!(code(Error::new_up(WriteTimedout), false), Some(504));
        assert_eq!(code(Error::new_down(ReadError), false), None);
        assert_eq!(code(Error::new_down(InternalError), false), Some(400));
        assert_eq!(code(Error::new_in(InternalError), false), Some(500));
        let error = unavailable("there is no leader");
        let expected = Reply {
            code: 503,
            reason: "there is no leader",
        };
        assert_eq!(reply_to(&error, false), Some(expected));
    }

    #[test]
    fn a_backend_has_its_time_after_the_last_byte_of_a_request() {
        let mut state = RequestState::new();
        state.silence = Silence::of(Duration::from_secs(10));
        let late = Error::new_up(ErrorType::ReadTimedout);
        let ago = |seconds| {
            Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .unwrap()
        };
        for (is_complete, sent, expected) in [
            (false, 10, true),
            (true, 1, true),
            (true, 10, false),
            (true, 60, false),
        ] {
            state.is_complete = is_complete;
            state.sent = ago(sent);
            let had_little = had_little_time(&state, &late);
            assert_eq!(had_little, expected, "{is_complete} {sent}");
            assert_eq!(is_slow_upload(&state, &late), !is_complete);
        }
        let other = Error::new_up(ErrorType::ReadError);
        assert!(!had_little_time(&state, &other));
    }
}
