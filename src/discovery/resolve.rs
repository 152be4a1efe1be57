//! Resolves the host names of a group.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::RecordType;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::warn;

use super::names::{Names, Resolved};

/// This many names are resolved at once.
const AT_ONCE: usize = 16;
/// How often a resolver is tried to be made, as long as there is none.
const RESOLVER_AGAIN: Duration = Duration::from_secs(5);
/// An answer takes at most this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Resolves names whenever they are due, with these servers; without any, with those of the system.
pub(super) async fn resolve(names: Arc<Names>, servers: Vec<SocketAddr>) {
    let mut file = servers.is_empty().then(ResolverFile::default);
    let mut resolver = first_resolver(&servers).await;
    // What an earlier run had begun.
    names.restart();
    let mut waiting: VecDeque<String> = VecDeque::new();
    let mut running = JoinSet::new();
    loop {
        let (due, next) = names.take_due(Instant::now());
        waiting.extend(due);
        // As when a network has come, or has got another server.
        if !waiting.is_empty()
            && file.as_mut().is_some_and(ResolverFile::has_changed)
            && let Ok(new) = self::resolver(&servers)
        {
            resolver = Arc::new(new);
        }
        while running.len() < AT_ONCE
            && let Some(name) = waiting.pop_front()
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
            Some(ended) = running.join_next() => match ended {
                Ok((name, answer)) => names.set(&name, answer, Instant::now()),
                // A panic. Which name it was is not known.
                Err(_) => names.restart(),
            },
            () = names.wanted.notified() => {}
            () = next => {}
        }
    }
}

/// The servers of the system.
#[derive(Default)]
struct ResolverFile {
    read: Option<SystemTime>,
}

impl ResolverFile {
    /// Whether they are others than when this was last asked.
    fn has_changed(&mut self) -> bool {
        let changed = std::fs::metadata("/etc/resolv.conf").and_then(|file| file.modified());
        let changed = changed.ok();
        std::mem::replace(&mut self.read, changed) != changed
    }
}

/// There may be none as long as there is no network.
async fn first_resolver(servers: &[SocketAddr]) -> Arc<TokioResolver> {
    let mut is_told = false;
    loop {
        match resolver(servers) {
            Ok(resolver) => return Arc::new(resolver),
            Err(error) if !is_told => {
                warn!(
                    error,
                    "host names cannot be resolved yet: there is no resolver"
                );
                is_told = true;
            }
            Err(_) => {}
        }
        sleep(RESOLVER_AGAIN).await;
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

/// Asks for both kinds of addresses. If only one can be asked for, that is no failure.
async fn addresses(resolver: &TokioResolver, name: &str) -> Result<Resolved, String> {
    let (ipv4, ipv6) = tokio::join!(
        addresses_of(resolver, name, RecordType::A),
        addresses_of(resolver, name, RecordType::AAAA),
    );
    let mut resolved = Resolved {
        addresses: Vec::new(),
        valid_until: Instant::now(),
        failed: None,
    };
    let mut ends = Vec::new();
    let mut error = None;
    for (found, is_ipv6) in [(ipv4, false), (ipv6, true)] {
        match found {
            Ok((addresses, valid_until)) => {
                ends.extend((!addresses.is_empty()).then_some(valid_until));
                resolved.addresses.extend(addresses);
            }
            Err(reason) => {
                resolved.failed = Some(is_ipv6);
                error = Some(reason);
            }
        }
    }
    if resolved.addresses.is_empty() {
        return Err(error.unwrap_or_else(|| "it has no address".to_owned()));
    }
    resolved.valid_until = ends.into_iter().min().unwrap_or(resolved.valid_until);
    Ok(resolved)
}

/// The addresses of one kind, and until when they are valid. None are no failure.
async fn addresses_of(
    resolver: &TokioResolver,
    name: &str,
    kind: RecordType,
) -> Result<(Vec<IpAddr>, Instant), String> {
    match resolver.lookup(name, kind).await {
        Ok(found) => {
            let answers = found.answers().iter();
            let addresses = answers.filter_map(|record| record.data.ip_addr());
            Ok((addresses.collect(), found.valid_until()))
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(_))) => Ok((Vec::new(), Instant::now())),
        Err(error) => Err(error.to_string()),
    }
}
