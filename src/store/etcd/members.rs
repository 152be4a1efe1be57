//! Endpoints that follow the cluster's member list.

use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::Client;
use tokio::time::timeout;
use tracing::{debug, error, info};

use super::connector::{Connector, NewConnection};
use super::endpoint::{self, MEMORY, is_same};
use super::options::EtcdOptions;
use super::status::{CallError, bounded};
use crate::supervise::{caught, say};

/// How often the members are listed, besides after each connection. Lengthened by up to a quarter at
/// random, because many processes start together.
const INTERVAL: Duration = Duration::from_secs(60);
/// The pause after a panic.
const RESTART_AFTER: Duration = Duration::from_secs(2);

/// Starts a task that lists the members until the connection is given up.
pub(super) fn follow(connector: &Arc<Connector>, new: NewConnection) {
    if !connector.options.sync_endpoints {
        return;
    }
    let NewConnection {
        connection,
        mut open,
        ..
    } = new;
    // Weak, so that the task does not keep the store alive.
    let connector = Arc::downgrade(connector);
    tokio::spawn(async move {
        let (client, endpoint) = (connection.client, connection.endpoint);
        loop {
            let pause = match caught(update(&connector, &client, &endpoint)).await {
                Ok(Some(())) => INTERVAL.mul_f64(1.0 + 0.25 * fastrand::f64()),
                Ok(None) => return,
                Err(panic) => {
                    say(|| error!(panic, "following the members of etcd failed, will retry"));
                    RESTART_AFTER
                }
            };
            // Nothing is ever sent: the channel closes with the connection.
            if timeout(pause, open.changed()).await.is_ok() {
                return;
            }
        }
    });
}

/// Lists the members and uses them as endpoints. Returns `None` when the store is gone.
async fn update(connector: &Weak<Connector>, client: &Client, endpoint: &str) -> Option<()> {
    let after = request_timeout(&*connector.upgrade()?);
    let mut client = client.clone();
    let mut members = bounded(after, client.member_list()).await;
    if let Err(error) = &members
        && has_fresh_token(connector, error).await
    {
        members = bounded(after, client.member_list()).await;
    }
    let members = match members {
        Ok(members) => members,
        Err(error) => {
            // The next call finds out whether the connection is the cause.
            debug!(endpoint, %error, "cannot list the members");
            return Some(());
        }
    };
    let connector = connector.upgrade()?;
    let urls = members
        .members()
        .iter()
        // A member that has not started yet has no URLs.
        .filter(|member| !member.is_learner())
        .flat_map(etcd_client::Member::client_urls)
        .map(|url| url.trim_end_matches('/'))
        .filter(|url| is_usable(&connector.options, url));
    connector.use_members(&urls.collect::<Vec<_>>());
    Some(())
}

fn request_timeout(connector: &Connector) -> Duration {
    let usual = connector.options.request_timeout;
    let link = connector.link();
    let connection = link.connection.as_ref();
    connection.map_or(usual, |connection| {
        connection.round_trips.request_timeout(usual)
    })
}

/// Whether the token was refused, and there is a fresh one now.
async fn has_fresh_token(connector: &Weak<Connector>, error: &CallError) -> bool {
    let Some(connector) = connector.upgrade() else {
        return false;
    };
    let current = connector.current();
    let Some(current) = current.filter(|_| connector.may_refresh(error)) else {
        return false;
    };
    let refreshed = connector.refresh_token(current.generation, current.token.version());
    refreshed.await.is_ok()
}

/// Whether a URL that a member advertises can be used with these options.
fn is_usable(options: &EtcdOptions, url: &str) -> bool {
    let has_tls = options.tls.is_some();
    let is_secure =
        |endpoint: &str| endpoint.starts_with("https://") || (has_tls && !endpoint.contains("://"));
    let wanted = options.endpoints.iter().any(|endpoint| is_secure(endpoint));
    let host = url.rsplit("//").next().unwrap_or_default();
    // Advertised by a member that was configured with its listen address.
    let is_unspecified = host.starts_with("0.0.0.0:") || host.starts_with("[::]:");
    // etcd's default. On another machine another etcd may be there.
    let is_local = |endpoint: &str| {
        let host = endpoint.rsplit("//").next().unwrap_or_default();
        ["localhost", "127.", "[::1]"]
            .iter()
            .any(|it| host.starts_with(it))
    };
    let may_be_local = || options.endpoints.iter().any(|endpoint| is_local(endpoint));
    is_secure(url) == wanted
        && !is_unspecified
        && (!is_local(url) || may_be_local())
        && !url.starts_with(MEMORY)
        && endpoint::check(url, usize::MAX, has_tls).is_ok()
}

impl Connector {
    /// Uses the members as endpoints, and those that are configured after them.
    fn use_members(&self, urls: &[&str]) {
        let mut endpoints: Vec<Arc<str>> = Vec::new();
        let mut add = |all: &mut dyn Iterator<Item = &str>| {
            for endpoint in all {
                if !endpoints.iter().any(|other| is_same(other, endpoint)) {
                    endpoints.push(Arc::from(endpoint));
                }
            }
            endpoints.len()
        };
        let members = add(&mut urls.iter().copied());
        let configured = self.options.endpoints.iter();
        add(&mut configured.map(|endpoint| endpoint.trim_end_matches('/')));
        let mut link = self.link();
        let is_shuffled = self.options.shuffle_endpoints;
        // The members in any order, and behind them the others.
        let is_same_set = link.endpoints.len() == endpoints.len()
            && endpoints[members..] == link.endpoints[members..]
            && endpoints[..members]
                .iter()
                .all(|it| link.endpoints[..members].contains(it));
        if link.endpoints == endpoints || (is_shuffled && is_same_set) {
            return;
        }
        if is_shuffled {
            fastrand::shuffle(&mut endpoints[..members]);
        }
        info!(?endpoints, "the endpoints follow the members of etcd");
        let current = link
            .connection
            .as_ref()
            .map(|current| current.endpoint.clone());
        link.endpoints = endpoints;
        if let Some(current) = current {
            link.next = link.position(&current);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_reached_as_the_endpoints_are() {
        let plain = EtcdOptions::new(["host:2379"]);
        assert!(is_usable(&plain, "http://10.0.0.1:2379"));
        for url in [
            "https://10.0.0.1:2379",
            "http://0.0.0.0:2379",
            "http://[::]:2379",
            "http://10.0.0.1",
            "unix://socket:1",
            "memory://x",
            "",
        ] {
            assert!(!is_usable(&plain, url), "{url}");
        }
        let secure = EtcdOptions::new(["https://host:2379"]);
        assert!(!is_usable(&secure, "http://10.0.0.1:2379"));
        assert_eq!(
            is_usable(&secure, "https://10.0.0.1:2379"),
            cfg!(feature = "tls")
        );
    }
}
