//! The span of a request.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use ::pingora::Result;
use ::pingora::http::RequestHeader;
use http::uri::Authority;
use http::{HeaderMap, Uri};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::trace::SdkTracer;
use tracing::error;

use super::export;
use crate::config::OpenTelemetry;
use crate::proxy::access_log::AccessLogEntry;
use crate::proxy::outcome::Outcome;
use crate::proxy::trace::{TRACESTATE, TraceParent, insert, trace_parent, written};
use crate::supervise::say;

/// Makes spans of requests.
pub(in crate::proxy) struct Spans {
    config: OpenTelemetry,
    /// The thread is started by the first request: before, the process may still become another one.
    is_started: OnceLock<()>,
    tracer: Arc<OnceLock<SdkTracer>>,
}

/// The span of a request that has not ended.
pub(in crate::proxy) struct Span {
    span: opentelemetry_sdk::trace::Span,
    started: SystemTime,
    /// Whether the request continues the trace of somebody.
    has_parent: bool,
}

impl Spans {
    pub(in crate::proxy) fn new(config: &OpenTelemetry) -> Option<Self> {
        Some(Self {
            config: config.clone(),
            is_started: OnceLock::new(),
            tracer: Arc::default(),
        })
    }

    /// The span of a request that begins, if it has one: what a trusted proxy says counts, and otherwise chance.
    pub(in crate::proxy) fn begin(
        &self,
        request: &RequestHeader,
        is_trusted: bool,
    ) -> Option<Span> {
        self.is_started.get_or_init(|| self.start());
        let parent = trace_parent(&request.headers);
        let is_wanted = match parent {
            Some(parent) if is_trusted => TraceFlags::new(parent.flags).is_sampled(),
            _ => self.config.sample >= 1.0 || fastrand::f64() < self.config.sample,
        };
        if !is_wanted {
            return None;
        }
        let tracer = self.tracer.get()?;
        let started = SystemTime::now();
        let builder = tracer
            .span_builder(name(request))
            .with_kind(SpanKind::Server)
            .with_start_time(started);
        let has_parent = parent.is_some();
        let parent = parent.map_or_else(Context::new, |parent| {
            Context::new().with_remote_span_context(remote(parent))
        });
        let span = tracer.build_with_context(builder, &parent);
        Some(Span {
            span,
            started,
            has_parent,
        })
    }

    fn start(&self) {
        let (config, tracer) = (self.config.clone(), Arc::downgrade(&self.tracer));
        let thread = std::thread::Builder::new().name("spans".to_owned());
        if let Err(error) = thread.spawn(move || export::run(&config, &tracer)) {
            say(|| error!(%error, "no spans are sent to the collector"));
        }
    }
}

/// Clients cannot invent names of spans.
fn name(request: &RequestHeader) -> &'static str {
    known_method(request.method.as_str()).unwrap_or("HTTP")
}

fn known_method(method: &str) -> Option<&'static str> {
    const KNOWN: [&str; 9] = [
        "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE",
    ];
    KNOWN.into_iter().find(|known| *known == method)
}

/// Without the query, which may have secrets in it; of a request to a proxy, without the host.
fn path_of(target: &str) -> String {
    match target.starts_with('/') {
        true => target.split('?').next().unwrap_or_default().to_owned(),
        false => target
            .parse::<Uri>()
            .map_or_else(|_| String::new(), |uri| uri.path().to_owned()),
    }
}

fn remote(parent: TraceParent) -> SpanContext {
    SpanContext::new(
        TraceId::from(parent.trace),
        SpanId::from(parent.parent),
        TraceFlags::new(parent.flags),
        true,
        TraceState::default(),
    )
}

impl Span {
    /// The backend's spans are children of this one.
    pub(in crate::proxy) fn add_to(&self, headers: &mut HeaderMap) -> Result<()> {
        let context = self.span.span_context();
        if !self.has_parent {
            headers.remove(TRACESTATE);
        }
        let trace = u128::from_be_bytes(context.trace_id().to_bytes());
        let span = u64::from_be_bytes(context.span_id().to_bytes());
        insert(
            headers,
            &written(trace, span, context.trace_flags().to_u8()),
        )
    }

    /// The request has ended as `entry` says; the names of attributes are those of OpenTelemetry's semantic conventions
    /// for HTTP, and our own begin with `pingora_etcd`.
    pub(in crate::proxy) fn end(
        mut self,
        entry: &AccessLogEntry,
        group: Option<&str>,
        route: Option<&str>,
    ) {
        let span = &mut self.span;
        span.set_attributes(attributes(entry, group, route));
        let failed = entry.status.is_none_or(|status| status >= 500);
        if failed || entry.error.is_some() && entry.outcome == Outcome::Failed {
            span.set_status(Status::error(entry.error.clone().unwrap_or_default()));
        }
        // Whatever the clock has done meanwhile.
        span.end_with_timestamp(self.started + entry.duration);
    }
}

fn attributes(entry: &AccessLogEntry, group: Option<&str>, route: Option<&str>) -> Vec<KeyValue> {
    let path = path_of(&entry.target);
    let method = known_method(&entry.method);
    let host = entry
        .host
        .as_deref()
        .and_then(|host| host.parse::<Authority>().ok());
    let scheme = if entry.tls { "https" } else { "http" };
    let version = entry.protocol.trim_start_matches("HTTP/");
    let version = if version == "2.0" { "2" } else { version };
    let text = |text: &str| Some(Value::from(text.to_owned()));
    let optional = |value: &Option<String>| value.as_deref().and_then(text);
    let named = [
        ("http.request.method", text(method.unwrap_or("_OTHER"))),
        (
            "http.request.method_original",
            method.is_none().then(|| entry.method.clone().into()),
        ),
        ("url.path", text(&path)),
        ("url.scheme", text(scheme)),
        ("network.protocol.version", text(version)),
        (
            "server.address",
            host.as_ref().and_then(|host| text(host.host())),
        ),
        (
            "server.port",
            host.as_ref()
                .and_then(|host| Some(i64::from(host.port_u16()?).into())),
        ),
        (
            "client.address",
            entry.client.map(|client| client.to_string().into()),
        ),
        ("user_agent.original", optional(&entry.user_agent)),
        (
            "http.response.status_code",
            entry.status.map(|status| i64::from(status).into()),
        ),
        (
            "rpc.response.status_code",
            entry.grpc_status.map(|status| status.to_string().into()),
        ),
        ("pingora_etcd.group", group.and_then(text)),
        ("pingora_etcd.route", route.and_then(text)),
        ("pingora_etcd.node", optional(&entry.node)),
        ("pingora_etcd.upstream", optional(&entry.upstream)),
        (
            "pingora_etcd.tries",
            i64::try_from(entry.tries).ok().map(Value::from),
        ),
        ("pingora_etcd.outcome", text(entry.outcome.as_str())),
    ];
    let named = named.into_iter();
    named
        .filter_map(|(name, value)| Some(KeyValue::new(name, value?)))
        .collect()
}
