//! Where log lines go.

/// Those of this crate and its examples, and warnings of others, to standard error; `RUST_LOG`
/// overrides.
pub fn init() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "warn,pingora_etcd=info,load_balancer=info,worker=info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
