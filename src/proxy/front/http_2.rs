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

impl<A: HttpServerApp + Send + Sync + 'static> Front<A> {
    /// Serves a connection until it ends. Once it has had no request for long enough, and when the process is to end, its
    /// client is asked to use another one.
    pub(super) async fn serve_http_2(&self, stream: ClientStream, shutdown: &ShutdownWatch) {
        let connection = stream.connection();
        let (idle, drain) = stream.idle_and_drain();
        let (end, ends) = watch::channel(false);
        let serving = self.app.process_new(Box::new(stream), &ends);
        tokio::pin!(serving);
        tokio::select! {
            biased;
            _ = &mut serving => return,
            () = until_closing(shutdown.clone()) => {}
            () = until_idle(&connection, idle) => {}
        }
        end.send_replace(true);
        // The client says when it has read that. One that says nothing is not waited for.
        tokio::select! {
            biased;
            _ = &mut serving => {}
            () = until_empty(&connection, drain) => {}
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

/// Ends when there is no request, after this time at the earliest.
async fn until_empty(connection: &Arc<Connection>, within: Duration) {
    tokio::time::sleep(within).await;
    while connection.idle_for().is_none() {
        tokio::time::sleep(within).await;
    }
}
