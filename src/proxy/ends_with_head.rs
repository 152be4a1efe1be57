//! Responses over HTTP/2 that are complete with their head, such as an error of gRPC.

use std::any::Any;
use std::sync::LazyLock;
use std::time::Duration;

use ::pingora::Result;
use ::pingora::http::ResponseHeader;
use ::pingora::modules::http::{HttpModule, HttpModuleBuilder, HttpModules, Module};
use ::pingora::proxy::Session;
use async_trait::async_trait;

use super::front::OpenStream;

/// Notices that a response ends with its head, which no hook is told.
struct EndsWithHead(Option<(OpenStream, Duration)>);

/// From the end of the response on, what is left of the request has this much time.
pub(super) fn watch(session: &mut Session, stream: OpenStream, drain: Duration) {
    // Made once: all calls of gRPC come here.
    static MODULES: LazyLock<HttpModules> = LazyLock::new(|| {
        let mut modules = HttpModules::new();
        modules.add_module(Box::new(Builder));
        modules
    });
    session.downstream_modules_ctx = MODULES.build_ctx();
    if let Some(module) = session.downstream_modules_ctx.get_mut::<EndsWithHead>() {
        module.0 = Some((stream, drain));
    }
}

#[async_trait]
impl HttpModule for EndsWithHead {
    async fn response_header_filter(&mut self, _: &mut ResponseHeader, is_end: bool) -> Result<()> {
        if let Some((stream, drain)) = self.0.as_ref().filter(|_| is_end) {
            stream.drains(*drain);
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

struct Builder;

impl HttpModuleBuilder for Builder {
    fn init(&self) -> Module {
        Box::new(EndsWithHead(None))
    }
}
