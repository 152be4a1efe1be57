//! The thread that sends spans.

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, Weak};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    self, BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tracing::{error, info, warn};

use crate::config::OpenTelemetry;
use crate::proxy::shutdown::Shutdown;
use crate::supervise::{caught, say};

/// How long a span may wait before it is sent.
const SEND_AFTER: Duration = Duration::from_millis(500);
/// How long the collector has for a connection, and then for an answer. The end of the process waits for that long.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How often it is looked whether the process is about to end.
const POLL: Duration = Duration::from_millis(50);

/// Sends what the tracer gets, until the process ends or nobody has the tracer any more. The tracer is put into `tracer`
/// when it can be used.
pub(super) fn run(config: &OpenTelemetry, tracer: &Weak<OnceLock<SdkTracer>>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = runtime.map_err(Into::into).and_then(|runtime| {
        let sent = runtime.block_on(caught(send(config, tracer)));
        runtime.shutdown_background();
        sent?
    });
    if let Err::<(), Box<dyn Error>>(error) = done {
        say(|| error!(%error, "no spans are sent to the collector"));
    }
}

async fn send(
    config: &OpenTelemetry,
    tracer: &Weak<OnceLock<SdkTracer>>,
) -> Result<(), Box<dyn Error>> {
    let process = Shutdown::of_process();
    // The process does not end before the spans of its last requests have been sent.
    let mut writer = Some(process.writer());
    let provider = provider(config)?;
    if let Some(tracer) = tracer.upgrade() {
        // Set only here.
        let _ = tracer.set(provider.tracer("pingora-etcd"));
    }
    while tracer.strong_count() > 0 {
        tokio::time::sleep(POLL).await;
        if writer.is_some() && process.has_served() {
            flush(&provider).await;
            writer = None;
        }
    }
    flush(&provider).await;
    Ok(())
}

/// Sends what there is, if that does not take too long. What could not be sent has been said.
async fn flush(provider: &SdkTracerProvider) {
    let provider = provider.clone();
    let flush = tokio::task::spawn_blocking(move || provider.force_flush());
    let _ = tokio::time::timeout(TIMEOUT, flush).await;
}

fn provider(config: &OpenTelemetry) -> Result<SdkTracerProvider, Box<dyn Error>> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_timeout(TIMEOUT)
        .with_channel(channel(&config.endpoint)?)
        .build()?;
    let batches = BatchConfigBuilder::default().with_scheduled_delay(SEND_AFTER);
    let processor = BatchSpanProcessor::builder(Reported::new(exporter, &config.endpoint));
    let resource = Resource::builder()
        .with_service_name(config.service_name.clone())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    Ok(SdkTracerProvider::builder()
        .with_span_processor(processor.with_batch_config(batches.build()).build())
        .with_resource(resource.build())
        // Requests without a span do not come this far.
        .with_sampler(Sampler::AlwaysOn)
        .build())
}

fn channel(endpoint: &str) -> Result<Channel, Box<dyn Error>> {
    let is_tls = endpoint.starts_with("https:");
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?
        .connect_timeout(TIMEOUT)
        .timeout(TIMEOUT);
    let endpoint = match is_tls {
        true => endpoint.tls_config(ClientTlsConfig::new().with_enabled_roots())?,
        false => endpoint,
    };
    Ok(endpoint.connect_lazy())
}

/// Says once that spans cannot be sent, and once that they can be again.
#[derive(Debug)]
struct Reported<E> {
    exporter: E,
    endpoint: String,
    is_failing: AtomicBool,
}

impl<E> Reported<E> {
    fn new(exporter: E, endpoint: &str) -> Self {
        Self {
            exporter,
            endpoint: endpoint.to_owned(),
            is_failing: AtomicBool::new(false),
        }
    }

    fn report(&self, sent: &OTelSdkResult) {
        let was_failing = self.is_failing.swap(sent.is_err(), Ordering::Relaxed);
        let collector = &self.endpoint;
        match sent {
            Err(error) if !was_failing => {
                say(
                    || warn!(collector, %error, "spans cannot be sent to the collector; they are lost"),
                );
            }
            Ok(()) if was_failing => {
                say(|| info!(collector, "spans are sent to the collector again"));
            }
            _ => {}
        }
    }
}

impl<E: trace::SpanExporter> trace::SpanExporter for Reported<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let sent = self.exporter.export(batch).await;
        self.report(&sent);
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
