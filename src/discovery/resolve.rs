//! Resolves the host names of a group.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tracing::warn;

use super::names::Names;

/// This many names are resolved at once.
const AT_ONCE: usize = 16;
/// An answer takes at most this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Resolves names whenever they are due, with these servers; without any, with those of the system.
pub(super) async fn resolve(names: Arc<Names>, servers: Vec<SocketAddr>) {
    let resolver = match resolver(&servers) {
        Ok(resolver) => Arc::new(resolver),
        Err(error) => {
            warn!(error, "host names cannot be resolved: there is no resolver");
            return;
        }
    };
    let mut waiting: Vec<String> = Vec::new();
    let mut running = JoinSet::new();
    loop {
        let (due, next) = names.take_due(Instant::now());
        waiting.extend(due);
        while running.len() < AT_ONCE
            && let Some(name) = waiting.pop()
        {
            let resolver = resolver.clone();
            running.spawn(async move {
                let answer = timeout(PATIENCE, addresses(&resolver, &name)).await;
                (
                    name,
                    answer.unwrap_or_else(|_| Err("no answer in time".to_owned())),
                )
            });
        }
        let next = async {
            match next {
                Some(next) => sleep_until(next.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(Ok((name, answer))) = running.join_next() => {
                names.set(&name, answer, Instant::now());
            }
            () = names.wanted.notified() => {}
            () = next => {}
        }
    }
}

fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, String> {
    let mut builder = if servers.is_empty() {
        TokioResolver::builder_tokio().map_err(|error| error.to_string())?
    } else {
        let servers = servers.iter().map(|server| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
            let connections = connections.map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.into())
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .with_options(ResolverOpts::default())
    };
    // What is kept is kept by the caller, also while there is no answer.
    builder.options_mut().cache_size = 0;
    builder.build().map_err(|error| error.to_string())
}

async fn addresses(resolver: &TokioResolver, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
    let found = resolver.lookup_ip(name).await;
    let found = found.map_err(|error| error.to_string())?;
    let addresses: Vec<_> = found.iter().collect();
    match addresses.is_empty() {
        true => Err("it has no address".to_owned()),
        false => Ok((addresses, found.valid_until())),
    }
}
