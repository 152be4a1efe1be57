//! Connections of HTTP/1 that go on after the error response of a request whose tries have failed. Pingora ends them,
//! so that while backends are away each request of each client would cost a connection, and a TLS handshake.

use ::pingora::apps::{HttpPersistentSettings, ReusedHttpStream};
use ::pingora::protocols::http::ServerSession;
use ::pingora::proxy::Session;

use super::request_state::RequestState;

impl RequestState {
    /// Whether the client's connection can go on after an error response to this request: there is a front that goes on
    /// with it, and nothing of the request is left to be read.
    pub(super) fn can_keep_connection(&self) -> bool {
        let connection = self.connection.as_ref();
        let is_open = connection.is_some_and(|connection| connection.ended().is_none());
        is_open && self.is_complete && !self.is_upgrade
    }
}

/// Takes the connection out of the session, if the response allows it to go on, and hands it to the front. The session is
/// good for nothing afterwards but to be dropped.
pub(super) async fn keep_connection(session: &mut Session, state: &RequestState) {
    let Some(connection) = &state.connection else {
        return;
    };
    if session.get_keepalive().is_none() {
        return;
    }
    let settings = HttpPersistentSettings::for_session(session);
    let (nothing, _) = tokio::io::duplex(1);
    let placeholder = Box::new(ServerSession::new_http1(Box::new(nothing)));
    let taken = std::mem::replace(&mut session.downstream_session, placeholder);
    if let Ok(Some(reusable)) = taken.finish().await {
        connection.keep(ReusedHttpStream::from_reusable_stream(reusable, settings));
    }
}
