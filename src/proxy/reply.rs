//! Which error response a client gets, and sending it.

use ::pingora::http::ResponseHeader;
use ::pingora::proxy::Session;
use ::pingora::{Error, ErrorSource, ErrorType, Result};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};

use super::front::Ended;
use super::grpc::{Call, status_of};
use super::request_state::RequestState;

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
    !context.is_complete
        && error.esource() == &ErrorSource::Upstream
        && error.etype() == &ErrorType::ReadTimedout
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
        (ErrorType::ConnectTimedout | ErrorType::ReadTimedout, ErrorSource::Upstream) => {
            (504, "the backend did not answer in time")
        }
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
    session.write_response_header(head, body.is_empty()).await?;
    match body.is_empty() {
        true => Ok(()),
        false => session.write_response_body(Some(body), true).await,
    }
}

impl Reply<'_> {
    /// Sends the response, and ends the client's connection.
    pub(super) async fn send(&self, session: &mut Session) -> Result<()> {
        if is_call(session) {
            return self.send_status(session).await;
        }
        let (head, body) = self.parts()?;
        session.write_error_response(head, body).await
    }

    /// Sends the response to a request for which no backend has been used. The client's connection
    /// stays.
    pub(super) async fn answer(&self, session: &mut Session) -> Result<()> {
        if is_call(session) {
            return self.send_status(session).await;
        }
        let (head, body) = self.parts()?;
        respond(session, Box::new(head), body).await
    }

    /// Sends the response to a call of gRPC: its status is in the head, and there is nothing else.
    async fn send_status(&self, session: &mut Session) -> Result<()> {
        let mut response = ResponseHeader::build(200, Some(4))?;
        response.insert_header(CONTENT_TYPE, "application/grpc")?;
        response.insert_header("grpc-status", status_of(self.code))?;
        // The reasons are plain words, which need no encoding.
        response.insert_header("grpc-message", self.reason)?;
        session
            .write_response_header(Box::new(response), true)
            .await
    }

    fn parts(&self) -> Result<(ResponseHeader, Bytes)> {
        let body = Bytes::from(format!("{}\n", self.reason));
        let mut response = ResponseHeader::build(self.code, Some(4))?;
        response.insert_header(CONTENT_TYPE, "text/plain; charset=utf-8")?;
        response.insert_header(CONTENT_LENGTH, body.len())?;
        if self.code == 503 {
            response.insert_header(RETRY_AFTER, "1")?;
        }
        Ok((response, body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_response() {
        use ErrorType::{ConnectRefused, ConnectTimedout, InternalError, ReadError, ReadTimedout};
        let code = |error: Box<Error>, leader_failed| {
            reply_to(&error, leader_failed).map(|reply| reply.code)
        };
        assert_eq!(code(Error::new_up(ConnectRefused), true), Some(503));
        assert_eq!(code(Error::new_up(ConnectRefused), false), Some(502));
        assert_eq!(code(Error::new_up(ConnectTimedout), false), Some(504));
        assert_eq!(code(Error::new_up(ReadTimedout), true), Some(504));
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
}
