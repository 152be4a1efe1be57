//! What clients of HTTP/1.0 do not know.

use std::any::Any;
use std::net::SocketAddr;

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::modules::http::{HttpModule, HttpModuleBuilder, HttpModules, Module};
use ::pingora::proxy::Session;
use async_trait::async_trait;
use http::header::{HOST, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderValue, Version};

/// Takes out what Pingora adds to responses after all filters.
struct WithoutChunks;

#[async_trait]
impl HttpModule for WithoutChunks {
    async fn response_header_filter(
        &mut self,
        response: &mut ResponseHeader,
        _: bool,
    ) -> Result<()> {
        response.remove_header(&TRANSFER_ENCODING);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl HttpModuleBuilder for WithoutChunks {
    fn init(&self) -> Module {
        Box::new(Self)
    }
}

/// Responses to a client of HTTP/1.0 have no chunks, whatever speaks to the backend, and none is in between (RFC 9110,
/// section 15.2, and RFC 9112, section 6.1).
pub(super) fn keep_from_old_clients(session: &mut Session) {
    if session.req_header().version >= Version::HTTP_11 {
        return;
    }
    session.set_ignore_info_resp(true);
    let mut modules = HttpModules::new();
    modules.add_module(Box::new(WithoutChunks));
    session.downstream_modules_ctx = modules.build_ctx();
}

/// A client of HTTP/1.0 need not say which host it asks for, and backends are asked in versions in which that has to be
/// said: it is the backend itself, as with nginx.
pub(super) fn name_host(session: &Session, headers: &mut HeaderMap, backend: Option<SocketAddr>) {
    if session.req_header().version < Version::HTTP_11
        && !headers.contains_key(HOST)
        && let Some(Ok(host)) = backend.map(|addr| HeaderValue::try_from(addr.to_string()))
    {
        headers.insert(HOST, host);
    }
}
