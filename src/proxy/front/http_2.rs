//! Connections of HTTP/2, and how they end: with GOAWAY, so that a client knows which of its requests were not taken.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::{HttpServerApp, ServerApp};
use ::pingora::server::ShutdownWatch;
use tokio::sync::watch;

use super::Front;
use super::connection::Connection;
use super::stream::ClientStream;
use crate::proxy::shutdown::Shutdown;

/// A client that is there has read GOAWAY, and answered the PING that follows it, within this time.
const ANSWERED_WITHIN: Duration = Duration::from_secs(2);

impl<A: HttpServerApp + Send + Sync + 'static> Front<A> {
    /// Serves a connection until it ends. Once it has had no request for long enough, and when the process is to end, its
    /// client is asked to use another one.
    pub(super) async fn serve_http_2(&self, stream: ClientStream, shutdown: &ShutdownWatch) {
        let connection = stream.connection();
        let idle = stream.client_idle();
        let (end, ends) = watch::channel(false);
        let serving = self.app.process_new(Box::new(stream), &ends);
        tokio::pin!(serving);
        let is_idle = tokio::select! {
            biased;
            _ = &mut serving => return,
            () = until_closing(shutdown.clone()) => false,
            () = until_idle(&connection, idle) => true,
        };
        end.send_replace(true);
        // The client says when it has read that. One that has had no request for so long, and says nothing, is not waited for.
        tokio::select! {
            biased;
            _ = &mut serving => {}
            () = until_silent(&connection, idle), if is_idle => {}
        }
    }
}

/// Ends when the process begins to drain, or accepts nothing any more.
async fn until_closing(mut shutdown: ShutdownWatch) {
    let process = Shutdown::of_process();
    let drains = async {
        // Who connects during the drain would only come back, again and again.
        match process.is_draining() {
            true => std::future::pending().await,
            false => process.until_draining().await,
        }
    };
    tokio::select! {
        _ = shutdown.wait_for(|is_over| *is_over) => {}
        () = drains => {}
    }
}

/// Ends when there has been no request for this time.
async fn until_idle(connection: &Arc<Connection>, within: Duration) {
    loop {
        let left = connection
            .idle_for()
            .map(|idle| within.saturating_sub(idle));
        match left {
            Some(Duration::ZERO) => return,
            left => tokio::time::sleep(left.unwrap_or(within)).await,
        }
    }
}

/// Ends when the client has not answered, and has sent no request meanwhile. Otherwise, when it has had none for this time
/// again: what it has asked for may still be on its way.
async fn until_silent(connection: &Arc<Connection>, idle: Duration) {
    tokio::time::sleep(ANSWERED_WITHIN).await;
    until_idle(connection, idle.min(ANSWERED_WITHIN)).await;
    if connection.idle_for().is_none_or(|it| it < idle) {
        until_idle(connection, idle).await;
    }
}
