//! What may be changed with the token: nodes are drained, weighed, taken out, made leader, and the file is read again.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::post;
use serde::Deserialize;
use serde_json::json;
use subtle::ConstantTimeEq;
use tokio::time::timeout;
use tracing::info;

use super::events::Event;
use super::shown::Shown;
use crate::error::ClusterError;
use crate::operator::Operator;
use crate::supervise::say;

/// A transfer takes at most this long.
const TRANSFER_WITHIN: Duration = Duration::from_secs(5);
/// What else is asked of etcd takes at most this long.
const WITHIN: Duration = Duration::from_secs(10);
/// A reload is answered after this long, before the connection would be taken for one on which nothing happens.
const RELOAD_ANSWERED_WITHIN: Duration = Duration::from_secs(45);

/// The paths that change something; each needs the token.
pub(super) fn routes(shown: &Arc<Shown>) -> Router<Arc<Shown>> {
    Router::new()
        .route("/api/v1/reload", post(reload))
        .route(
            "/api/v1/groups/{group}/nodes/{node}/{action}",
            post(operate),
        )
        .layer(from_fn_with_state(shown.clone(), check_token))
}

/// Lets nobody through without the token. A browser never sends it by itself, so no page of others can.
async fn check_token(State(shown): State<Arc<Shown>>, request: Request, next: Next) -> Response {
    let Some(token) = shown.token.as_deref() else {
        return refused(
            StatusCode::FORBIDDEN,
            "nothing can be changed here: cluster.admin.token_file is not set",
        );
    };
    let given = request.headers().get(AUTHORIZATION);
    let given = given.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let is_right = given.is_some_and(|given| bool::from(given.ct_eq(token.as_bytes())));
    match is_right {
        true => next.run(request).await,
        false => refused(StatusCode::UNAUTHORIZED, "this is not the token"),
    }
}

fn refused(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({ "error": reason }))).into_response()
}

fn answer(result: Result<serde_json::Value, ClusterError>) -> Response {
    match result {
        Ok(done) => Json(done).into_response(),
        Err(error) => {
            let status = match &error {
                ClusterError::NotRegistered { .. } => StatusCode::NOT_FOUND,
                ClusterError::OperationRefused { .. } => StatusCode::CONFLICT,
                ClusterError::InvalidConfig { .. } | ClusterError::ConfigFile { .. } => {
                    StatusCode::UNPROCESSABLE_ENTITY
                }
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            refused(status, &error.to_string())
        }
    }
}

async fn reload(State(shown): State<Arc<Shown>>) -> Response {
    let Some(parts) = &shown.proxy else {
        return refused(StatusCode::NOT_FOUND, "this process has no file");
    };
    let reloader = parts.reloader.clone();
    // In a task of its own, which goes on when nobody waits for it any more.
    let reload = tokio::spawn(async move { reloader.reload_file().await });
    match timeout(RELOAD_ANSWERED_WITHIN, reload).await {
        Ok(Ok(reloaded)) => answer(reloaded.map(|reloaded| {
            json!({ "changed": reloaded.is_changed, "needs_restart": reloaded.needs_restart })
        })),
        Ok(Err(_)) => refused(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the reload has ended without an outcome",
        ),
        Err(_) => {
            let waits = "the reload goes on: it waits for a view of a group, or for another reload; the status has its outcome";
            (StatusCode::ACCEPTED, Json(json!({ "pending": waits }))).into_response()
        }
    }
}

/// `null` for the node's own; a body without it is a mistake.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Weight {
    #[serde(deserialize_with = "Option::deserialize")]
    weight: Option<f64>,
}

async fn operate(
    State(shown): State<Arc<Shown>>,
    Path((group, node, action)): Path<(String, String, String)>,
    body: Bytes,
) -> Response {
    let operator = shown
        .proxy
        .as_ref()
        .and_then(|parts| parts.reloader.operator(&group));
    let operator = match operator {
        Some(Ok(operator)) => operator,
        Some(Err(error)) => return answer(Err(error)),
        None => return refused(StatusCode::NOT_FOUND, "there is no such group"),
    };
    let weight = match action.as_str() {
        "weight" => match serde_json::from_slice::<Weight>(&body) {
            Ok(said) => said.weight,
            Err(error) => return refused(StatusCode::BAD_REQUEST, &format!("the body: {error}")),
        },
        _ => None,
    };
    let acting = act(&operator, &node, &action, weight);
    let Ok(done) = timeout(WITHIN, acting).await else {
        return refused(StatusCode::GATEWAY_TIMEOUT, "etcd has not answered in time");
    };
    let Some(done) = done else {
        return refused(
            StatusCode::NOT_FOUND,
            "the action is none of drain, undrain, weight, transfer, evict",
        );
    };
    if done.is_ok() {
        say(|| {
            info!(
                group,
                node,
                action,
                ?weight,
                "an operator has changed a node by the admin interface"
            );
        });
        let text = match weight {
            Some(weight) => format!("an operator: weight {weight} for {node}"),
            None => format!("an operator: {action} {node}"),
        };
        shown.events.add(Event::now(&group, text));
    }
    answer(done.map(|()| json!({ "node": node, "done": action })))
}

/// `None` for an action that there is not.
async fn act(
    operator: &Operator,
    node: &str,
    action: &str,
    weight: Option<f64>,
) -> Option<Result<(), ClusterError>> {
    Some(match action {
        "drain" => operator.drain(node).await,
        "undrain" => operator.undrain(node).await,
        "weight" => operator.set_weight(node, weight).await,
        "transfer" => operator.transfer(node, TRANSFER_WITHIN).await.map(drop),
        "evict" => operator.evict(node, false).await,
        _ => return None,
    })
}
