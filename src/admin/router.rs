//! The paths, and who may ask for them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use futures_core::Stream;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::{BroadcastStream, IntervalStream};
use tokio_stream::{StreamExt, iter};

use super::operate::routes;
use super::page::page;
use super::shown::Shown;
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
        .merge(routes(&shown))
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

async fn status(State(shown): State<Arc<Shown>>) -> Json<Status> {
    Json(shown.status())
}

async fn ready(State(shown): State<Arc<Shown>>) -> (StatusCode, &'static str) {
    match is_ready(&shown.groups()) {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

async fn metrics_text(State(shown): State<Arc<Shown>>) -> Response {
    let most = shown.options.metrics_nodes;
    match metrics::text(&shown, most) {
        Ok(text) => ([(CONTENT_TYPE, METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// The events so far, each new one, and the status each second.
async fn events(
    State(shown): State<Arc<Shown>>,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, StatusCode> {
    // Those who ask whether the process is ready are not to wait for a page to be closed.
    let place = shown.pages.clone().try_acquire_owned();
    let place = place.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let (kept, new) = shown.events.follow();
    // Whoever was too slow misses some.
    let new = BroadcastStream::new(new).filter_map(Result::ok);
    let happened = iter(kept)
        .chain(new)
        .filter_map(|event| sse::Event::default().event("event").json_data(event).ok());
    let mut ticks = tokio::time::interval(EVERY);
    // Whoever was asleep wants the status now, and not all of those since then.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let ticks = IntervalStream::new(ticks);
    let status = ticks.filter_map(move |_| {
        let _place = &place;
        Some(sse::Event::default().event("status").data(shown.told()))
    });
    let stream = happened.merge(status).map(Ok);
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}
