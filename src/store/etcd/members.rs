//! Endpoints that follow the cluster's member list.

use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::Client;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, error, info};

use super::connection::Connection;
use super::{EtcdStore, Shared, bounded};
use crate::error::ClusterError;
use crate::store::options::is_usable;
use crate::supervise::{caught, say};

/// How often members are asked for, beside after each connection. Lengthened by up to a quarter at
/// random: many processes start together.
const EVERY: Duration = Duration::from_secs(60);
/// After a panic.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// Asks for the members until the connection is given up. A task of the connection's own.
pub(super) fn follow(store: &EtcdStore, connection: &Connection, mut open: watch::Receiver<()>) {
    if !store.shared.options.sync_endpoints {
        return;
    }
    // Not to keep the store alive.
    let shared = Arc::downgrade(&store.shared);
    let (client, endpoint) = (connection.client.clone(), connection.endpoint.clone());
    tokio::spawn(async move {
        loop {
            let pause = match caught(ask(&shared, &client, &endpoint)).await {
                Ok(true) => EVERY.mul_f64(1.0 + 0.25 * fastrand::f64()),
                Ok(false) => return,
                Err(panic) => {
                    say(|| {
                        error!(
                            panic,
                            "following the members of etcd has failed, it is tried again"
                        )
                    });
                    AGAIN_AFTER
                }
            };
            // Nothing is ever sent: an answer is the connection's end.
            if timeout(pause, open.changed()).await.is_ok() {
                return;
            }
        }
    });
}

/// Answers whether to go on.
async fn ask(shared: &Weak<Shared>, client: &Client, endpoint: &str) -> bool {
    let Some(after) = shared.upgrade().map(|shared| {
        let store = EtcdStore::background(shared);
        let link = store.link();
        let connection = link.connection.as_ref();
        connection.map_or(store.timeout(), |connection| {
            connection.round_trips.request_timeout(store.timeout())
        })
    }) else {
        return false;
    };
    let mut asking = client.clone();
    let mut members = bounded("members", endpoint, after, asking.member_list()).await;
    if let Err(error) = &members
        && has_new_token(shared, error).await
    {
        members = bounded("members", endpoint, after, asking.member_list()).await;
    }
    let members = match members {
        Ok(members) => members,
        Err(error) => {
            // Whoever calls next finds out whether the connection is to blame.
            debug!(endpoint, %error, "cannot ask for the members");
            return true;
        }
    };
    let Some(shared) = shared.upgrade() else {
        return false;
    };
    let store = EtcdStore::background(shared);
    let members = members.members().iter();
    let urls = members
        // One that has not started yet has none.
        .filter(|member| !member.is_learner())
        .flat_map(|member| member.client_urls())
        .map(|url| url.trim_end_matches('/'))
        .filter(|url| is_usable(&store.shared.options, url));
    store.use_members(&urls.collect::<Vec<_>>());
    true
}

/// Where the token was refused: whether there is another one now.
async fn has_new_token(shared: &Weak<Shared>, error: &ClusterError) -> bool {
    let Some(store) = shared.upgrade().map(EtcdStore::background) else {
        return false;
    };
    let used = store.link().connection.clone();
    let Some(used) = used.filter(|_| store.may_renew(error)) else {
        return false;
    };
    let renewed = store.renew_token(used.generation, used.token.version());
    renewed.await.is_ok()
}

impl EtcdStore {
    /// The members come first, those that are configured after them.
    fn use_members(&self, urls: &[&str]) {
        let mut endpoints: Vec<Arc<str>> = Vec::new();
        let configured = self.shared.options.endpoints.iter();
        let configured = configured.map(|endpoint| endpoint.trim_end_matches('/'));
        for endpoint in urls.iter().copied().chain(configured) {
            if !endpoints.iter().any(|other| is_same(other, endpoint)) {
                endpoints.push(Arc::from(endpoint));
            }
        }
        let mut link = self.link();
        if link.endpoints == endpoints {
            return;
        }
        info!(?endpoints, "the endpoints follow the members of etcd");
        let current = link
            .connection
            .as_ref()
            .map(|current| current.endpoint.clone());
        link.endpoints = endpoints;
        if let Some(current) = current {
            link.next = self.position(&link, &current);
        }
    }
}

/// Where the connection's endpoint is called otherwise in the list.
pub(super) fn is_same(one: &str, other: &str) -> bool {
    let bare = |endpoint: &str| {
        let rest = endpoint.rsplit("//").next().unwrap_or_default();
        rest.trim_end_matches('/').to_owned()
    };
    bare(one) == bare(other)
}
