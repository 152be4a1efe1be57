//! Tells the front what is being read from a client of a proxy of one's own: that keeps no time by itself, and has no hook that
//! does.

use std::any::Any;
use std::future::Future;
use std::sync::Arc;

use ::pingora::Result;
use ::pingora::http::{RequestHeader, ResponseHeader};
use ::pingora::modules::http::{HttpModule, HttpModuleBuilder, Module};
use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, EXPECT, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode};

use super::front::{Connection, Phase};

tokio::task_local! {
    /// The connection of the request that this task processes.
    static CONNECTION: Option<Arc<Connection>>;
}

/// Lets the module of a request know its connection.
pub(super) async fn follow_phases<T>(
    connection: Option<Arc<Connection>>,
    processing: impl Future<Output = T>,
) -> T {
    CONNECTION.scope(connection, processing).await
}

/// Makes a module for each request.
pub(super) struct Phases;

impl HttpModuleBuilder for Phases {
    fn init(&self) -> Module {
        Box::new(OfRequest {
            connection: CONNECTION.try_with(Clone::clone).unwrap_or_default(),
            is_complete: false,
            is_tunnel: false,
        })
    }
}

/// What is known of a request.
struct OfRequest {
    /// `None` where other requests are on the same connection, or none is.
    connection: Option<Arc<Connection>>,
    is_complete: bool,
    is_tunnel: bool,
}

impl OfRequest {
    fn enter(&self, phase: Phase) {
        if let Some(connection) = &self.connection {
            connection.enter(phase);
        }
    }

    fn answer_ends(&self) {
        if !self.is_complete && !self.is_tunnel {
            self.enter(Phase::Drain);
        }
    }
}

/// Whether nothing follows the head of a request of HTTP/1.
fn has_no_body(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH);
    !headers.contains_key(TRANSFER_ENCODING) && length.is_none_or(|length| length == "0")
}

#[async_trait]
impl HttpModule for OfRequest {
    async fn request_header_filter(&mut self, request: &mut RequestHeader) -> Result<()> {
        self.is_complete = has_no_body(&request.headers);
        let expects = request.headers.get(EXPECT);
        let is_expecting =
            expects.is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        if let Some(connection) = &self.connection {
            connection.expect_end(None);
            connection.expect_answer(None);
        }
        self.enter(match self.is_complete {
            true => Phase::Answer,
            false if is_expecting => Phase::Expect,
            false => Phase::Body,
        });
        Ok(())
    }

    async fn request_body_filter(&mut self, _: &mut Option<Bytes>, is_end: bool) -> Result<()> {
        if is_end && !self.is_tunnel && !self.is_complete {
            self.is_complete = true;
            self.enter(Phase::Answer);
        }
        Ok(())
    }

    async fn response_header_filter(
        &mut self,
        response: &mut ResponseHeader,
        is_end: bool,
    ) -> Result<()> {
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            self.is_tunnel = true;
            self.enter(Phase::Tunnel);
        } else if is_end {
            self.answer_ends();
        }
        Ok(())
    }

    fn response_body_filter(&mut self, _: &mut Option<Bytes>, is_end: bool) -> Result<()> {
        if is_end {
            self.answer_ends();
        }
        Ok(())
    }

    fn response_trailer_filter(&mut self, _: &mut Option<Box<HeaderMap>>) -> Result<Option<Bytes>> {
        self.answer_ends();
        Ok(None)
    }

    fn response_done_filter(&mut self) -> Result<Option<Bytes>> {
        self.answer_ends();
        Ok(None)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
