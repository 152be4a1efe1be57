//! What stands for spans where the feature `opentelemetry` is off: there are none.

use ::pingora::Result;
use ::pingora::http::RequestHeader;
use http::HeaderMap;

use crate::config::OpenTelemetry;
use crate::proxy::access_log::AccessLogEntry;

pub(in crate::proxy) enum Spans {}

pub(in crate::proxy) enum Span {}

impl Spans {
    /// The configuration is invalid without the feature.
    pub(in crate::proxy) fn new(_: &OpenTelemetry) -> Option<Self> {
        None
    }

    pub(in crate::proxy) fn begin(&self, _: &RequestHeader, _: bool) -> Option<Span> {
        match *self {}
    }
}

impl Span {
    pub(in crate::proxy) fn add_to(&self, _: &mut HeaderMap) -> Result<()> {
        match *self {}
    }

    pub(in crate::proxy) fn end(self, _: &AccessLogEntry, _: Option<&str>, _: Option<&str>) {
        match self {}
    }
}
