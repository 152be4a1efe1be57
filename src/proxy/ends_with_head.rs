//! Responses over HTTP/2 that are complete with their head, such as an error of gRPC.

use std::any::Any;
use std::time::Duration;

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::modules::http::{HttpModule, HttpModuleBuilder, HttpModules, Module};
use ::pingora::proxy::Session;
use async_trait::async_trait;

use super::front::OpenStream;

/// Notices that a response ends with its head, which no hook is told.
pub(super) struct EndsWithHead {
    stream: OpenStream,
    drain: Duration,
}

impl EndsWithHead {
    /// From then on, what is left of the request has this much time.
    pub(super) fn watch(session: &mut Session, stream: OpenStream, drain: Duration) {
        let mut modules = HttpModules::new();
        modules.add_module(Box::new(Self { stream, drain }));
        session.downstream_modules_ctx = modules.build_ctx();
    }
}

#[async_trait]
impl HttpModule for EndsWithHead {
    async fn response_header_filter(&mut self, _: &mut ResponseHeader, is_end: bool) -> Result<()> {
        if is_end {
            self.stream.drains(self.drain);
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl HttpModuleBuilder for EndsWithHead {
    fn init(&self) -> Module {
        Box::new(Self {
            stream: self.stream.clone(),
            drain: self.drain,
        })
    }
}
