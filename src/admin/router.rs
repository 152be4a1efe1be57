//! The paths, and who may ask for them.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures_core::Stream;
use tokio_stream::wrappers::{BroadcastStream, IntervalStream};
use tokio_stream::{StreamExt, iter};

use super::page::page;
use super::service::Shown;
use super::status::is_ready;
use super::{metrics, status::Status};

/// How often those who look get the status.
const EVERY: Duration = Duration::from_secs(1);
/// As Prometheus reads it.
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(super) fn router(shown: Arc<Shown>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/api/v1/status", get(status))
        .route("/api/v1/events", get(events))
        .route("/metrics", get(metrics_text))
        .route("/healthz", get("ok\n"))
        .route("/readyz", get(ready))
        .layer(from_fn_with_state(shown.clone(), check_host))
        .with_state(shown)
}

/// Refuses names that are not known to be of this process: a page of others whose name leads here could read
/// everything otherwise.
async fn check_host(State(shown): State<Arc<Shown>>, request: Request, next: Next) -> Response {
    let header = request.headers().get(HOST);
    let header = header.and_then(|host| host.to_str().ok());
    let authority = request.uri().authority();
    let host = header.or_else(|| authority.map(axum::http::uri::Authority::as_str));
    match host {
        Some(host) if shown.is_own_name(host) => next.run(request).await,
        _ => {
            let reason = "this name is not among cluster.admin.hosts\n";
            (StatusCode::MISDIRECTED_REQUEST, reason).into_response()
        }
    }
}

/// The host of a `Host` field, without port and brackets.
pub(super) fn host_of(text: &str) -> Option<String> {
    let uri: Uri = format!("http://{text}/").parse().ok()?;
    let host = uri.host()?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some(host.to_ascii_lowercase())
}

/// Whether a host is an address or `localhost`, which no page of others can have.
pub(super) fn is_local_name(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok()
}

async fn status(State(shown): State<Arc<Shown>>) -> Json<Status> {
    Json(shown.status())
}

async fn ready(State(shown): State<Arc<Shown>>) -> (StatusCode, &'static str) {
    match is_ready(&shown.groups) {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

async fn metrics_text(State(shown): State<Arc<Shown>>) -> Response {
    let most = shown.options.metrics_nodes;
    match metrics::text(&shown.groups, shown.started, most) {
        Ok(text) => ([(CONTENT_TYPE, METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// The events so far, each new one, and the status each second.
async fn events(
    State(shown): State<Arc<Shown>>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let (kept, new) = shown.events.follow();
    // Whoever was too slow misses some.
    let new = BroadcastStream::new(new).filter_map(Result::ok);
    let happened = iter(kept)
        .chain(new)
        .filter_map(|event| sse::Event::default().event("event").json_data(event).ok());
    let ticks = IntervalStream::new(tokio::time::interval(EVERY));
    let status = ticks.filter_map(move |_| {
        let status = sse::Event::default().event("status");
        status.json_data(shown.status()).ok()
    });
    let stream = happened.merge(status).map(Ok);
    Sse::new(stream).keep_alive(KeepAlive::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_localhost_are_local_names() {
        for (text, host, is_local) in [
            ("127.0.0.1:6189", "127.0.0.1", true),
            ("[::1]:6189", "::1", true),
            ("LocalHost", "localhost", true),
            ("evil.example:6189", "evil.example", false),
            ("127.0.0.1.evil.example", "127.0.0.1.evil.example", false),
        ] {
            let found = host_of(text).unwrap();
            assert_eq!((&*found, is_local_name(&found)), (host, is_local), "{text}");
        }
        assert_eq!(host_of("a b"), None);
        assert_eq!(host_of(""), None);
    }
}
