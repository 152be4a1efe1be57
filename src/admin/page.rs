//! The page: one document without anything from elsewhere.

use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY};
use axum::response::{Html, IntoResponse, Response};

const PAGE: &str = include_str!("page.html");
/// In the page, where the word for this answer has to be.
const NONCE: &str = "{{nonce}}";

/// The page. Its script and its style run, because they carry a word that is new each time; no other does.
pub(super) async fn page() -> Response {
    let nonce = format!("{:032x}", fastrand::u128(..));
    let policy = format!(
        "default-src 'none'; connect-src 'self'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store".to_owned()),
    ];
    (headers, Html(PAGE.replace(NONCE, &nonce))).into_response()
}
