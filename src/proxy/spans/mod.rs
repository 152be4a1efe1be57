//! A span for each request, for a collector of OpenTelemetry.

#[cfg(not(feature = "opentelemetry"))]
mod absent;
#[cfg(feature = "opentelemetry")]
mod export;
#[cfg(feature = "opentelemetry")]
mod request;

#[cfg(not(feature = "opentelemetry"))]
pub(super) use absent::{Span, Spans};
#[cfg(feature = "opentelemetry")]
pub(super) use request::{Span, Spans};
