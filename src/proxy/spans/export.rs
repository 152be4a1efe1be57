//! The thread that sends spans.

use std::error::Error;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    self, BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
};
use tracing::{error, info, warn};

use crate::config::OpenTelemetry;
use crate::proxy::shutdown::Shutdown;
use crate::supervise::{caught, say};

/// How long a span may wait before it is sent.
const SEND_AFTER: Duration = Duration::from_secs(1);
/// How long the collector has for an answer. A shutdown waits for that long if there is none.
const TIMEOUT: Duration = Duration::from_secs(3);
/// How often it is looked whether the process is about to end.
const POLL: Duration = Duration::from_millis(200);

/// Sends what the tracer gets, until the process ends. The tracer is put into `tracer` when it can be used.
pub(super) fn run(config: &OpenTelemetry, tracer: &OnceLock<SdkTracer>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = runtime.map_err(Into::into).and_then(|runtime| {
        let sent = caught(async {
            let provider = provider(config)?;
            // Set only here.
            let _ = tracer.set(provider.tracer("pingora-etcd"));
            flush_at_end(&provider).await;
            Ok(())
        });
        runtime.block_on(sent)?
    });
    if let Err::<(), Box<dyn Error>>(error) = done {
        say(|| error!(%error, "no spans are sent to the collector"));
    }
}

fn provider(config: &OpenTelemetry) -> Result<SdkTracerProvider, Box<dyn Error>> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(&config.endpoint)
        .with_timeout(TIMEOUT)
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

/// When the process drains, it does not end before what there is has been sent.
async fn flush_at_end(provider: &SdkTracerProvider) {
    let process = Shutdown::of_process();
    loop {
        tokio::time::sleep(POLL).await;
        if !process.is_draining() {
            continue;
        }
        let (hold, provider) = (process.hold(), provider.clone());
        let flush = tokio::task::spawn_blocking(move || provider.force_flush());
        // What could not be sent has been said.
        let _ = flush.await;
        drop(hold);
    }
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
