//! gRPC calls, of any method, that answer with a stream of empty messages: nine of ten short, the others long.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures_util::stream;
use http_body_util::BodyExt;
use pingora_etcd::metrics::RequestGuard;
use tokio::time::sleep;

use super::slots::Slots;

/// The content type of a call.
pub const GRPC: &str = "application/grpc";
/// How many messages a stream has.
const MESSAGES: u32 = 5;
/// A message without content: not compressed, of no bytes.
const EMPTY: &[u8] = &[0; 5];

/// Waits for a slot, and answers with a stream that holds it, and counts as in flight, until it ends.
pub async fn answer(slots: &Arc<Slots>, request: RequestGuard) -> Response {
    let held = (slots.enter().await, request);
    let pause = slots.stream_length() / MESSAGES;
    let messages = stream::unfold((0, held), move |(sent, held)| async move {
        if sent == MESSAGES {
            return None;
        }
        sleep(pause).await;
        let message = Ok::<_, Infallible>(Bytes::from_static(EMPTY));
        Some((message, (sent + 1, held)))
    });
    let trailers = HeaderMap::from_iter([(
        axum::http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    let body = Body::from_stream(messages).with_trailers(ready(Some(Ok(trailers))));
    let mut response = Response::new(Body::new(body));
    let content_type = HeaderValue::from_static(GRPC);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
