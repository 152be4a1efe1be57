//! What an operator does to the nodes of a group, from outside.

mod overrides;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::error::ClusterError;
use crate::ids::{LeaseId, Revision};
use crate::keys::{GroupKeys, check_group, check_node_id};
use crate::node::{Node, NodeState};
use crate::store::{Condition, Entry, Lease, Selector, Store, Txn};
use crate::validate;
use crate::view::NodeOverride;
use crate::worker::operators_request;

/// How long a request that another node leads stays, if the operator's program is gone.
const REQUEST_TTL: Duration = Duration::from_secs(10);
/// How often its lease is renewed meanwhile, and how long a renewal may take.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// How often to look whether it has been followed.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Drains nodes, weighs them, takes them out, and moves leadership, without their help and whoever wrote them.
/// The command `pingora-etcd` does the same.
///
/// Drains and weights are kept in etcd beside the registration: they hold for this process, also when it loses its
/// lease and registers again (for entries that do not say their run, as long as the lease), and say nothing of a
/// successor with the same id. What is left of nodes that are gone is removed when an operator drains or
/// weighs another node of the group, a week after that has first found the node gone. The balancers of this crate follow them (`BalancerService`, `LiveLoadBalancer`, `ClusterBackends` and the bundled load balancer); a view
/// of a group (`ServiceDiscovery`) still shows what the node says of itself.
///
/// ```
/// use pingora_etcd::{Cluster, EtcdOptions, Operator};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let cluster = Cluster::connect(EtcdOptions::memory("doc-operator"))?;
/// let operator = Operator::new(&cluster, "my-service")?;
/// let error = operator.drain("worker-1").await.unwrap_err();
/// assert!(error.to_string().contains("worker-1"));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Operator {
    cluster: Cluster,
    keys: GroupKeys,
    group: String,
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operator")
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

/// Who is to lead.
#[derive(Clone, Copy)]
struct Asked<'a> {
    id: &'a str,
    registered: &'a Registered,
    candidacy: &'a str,
    created: Revision,
}

/// A registration, as it is now.
struct Registered {
    key: String,
    entry: Entry,
}

impl Registered {
    /// What tells its process from others, also if the rest of the entry cannot be read.
    fn node(&self, id: &str) -> Node {
        let unreadable = || Node::new(id, std::net::Ipv4Addr::UNSPECIFIED.into());
        let node: Node = serde_json::from_slice(&self.entry.value).unwrap_or_else(|_| unreadable());
        node.with_incarnation(self.entry.incarnation())
    }
}

impl Operator {
    /// An operator of this group. Connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) if the name of the group is invalid.
    pub fn new(cluster: &Cluster, group: impl Into<String>) -> Result<Self, ClusterError> {
        let group = group.into();
        check_group(&group)?;
        Ok(Self {
            keys: GroupKeys::new(&cluster.key_prefix(), &group),
            cluster: cluster.clone(),
            group,
        })
    }

    /// Sends no new requests to a node; those in flight end as they would.
    ///
    /// # Errors
    ///
    /// When the node is not registered, or etcd refuses or does not answer.
    pub async fn drain(&self, id: &str) -> Result<(), ClusterError> {
        self.change(id, |said| said.state = NodeState::Draining)
            .await
    }

    /// Ends what [`drain`](Self::drain) has begun. A node that drains by itself still does.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain).
    pub async fn undrain(&self, id: &str) -> Result<(), ClusterError> {
        self.change(id, |said| said.state = NodeState::Serving)
            .await
    }

    /// Gives a node another static weight than it has registered; `None` for its own. Range: 0 (no traffic), or
    /// 0.000001 to 1,000,000; a node that registered none has 1.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain), and when the weight is out of range.
    pub async fn set_weight(&self, id: &str, weight: Option<f64>) -> Result<(), ClusterError> {
        if let Some(weight) = weight {
            validate::check_weight(weight)?;
        }
        self.change(id, |said| said.weight = weight).await
    }

    /// What operators have said of nodes, by node id. It counts for a node only if it
    /// [is meant for](NodeOverride::is_for) its process. What cannot be read is left out.
    ///
    /// # Errors
    ///
    /// When etcd refuses or does not answer.
    pub async fn overrides(&self) -> Result<HashMap<String, NodeOverride>, ClusterError> {
        let prefix = Selector::Prefix(self.keys.override_prefix().to_owned());
        let listing = self.store()?.list(&prefix, None).await?;
        let read = |entry: &Entry| {
            let said = NodeOverride::parse(&entry.value).ok()?;
            let id = self.keys.overridden(&entry.key)?.to_owned();
            (!said.is_empty()).then_some((id, said))
        };
        Ok(listing.entries.iter().filter_map(read).collect())
    }

    /// Removes a node, as if its process had ended: its lease is revoked, with everything under it, or, if it has none,
    /// its entry is deleted. This is for one that is gone and has left its entry, or that nobody can stop: a worker of
    /// this crate that lives registers again within seconds.
    ///
    /// A leader is not removed unless `force` says so, because a process that is only cut off may lead until it notices,
    /// beside its successor: that is what fencing tokens are for.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain), and for a leader without `force`.
    pub async fn evict(&self, id: &str, force: bool) -> Result<(), ClusterError> {
        let store = self.store()?;
        let registered = self.registered(&*store, id).await?;
        let Some(lease) = registered.entry.lease else {
            let created = registered.entry.create_revision;
            let txn = Txn::new().when(Condition::CreatedAt(registered.key.clone(), created));
            let txn = txn.delete(registered.key).delete(self.keys.override_of(id));
            return store.txn(txn).await.map(drop);
        };
        if !force && let Some(key) = self.leads_by(&*store, lease).await? {
            let reason =
                format!("its process leads by {key}; transfer leadership first, or use force");
            return Err(refused(id, &reason));
        }
        store.revoke(lease).await
    }

    /// A candidacy under this lease that leads, in whichever group: the nodes of one process share a lease.
    async fn leads_by(
        &self,
        store: &dyn Store,
        lease: LeaseId,
    ) -> Result<Option<String>, ClusterError> {
        let elections = format!("{}election/", self.cluster.key_prefix());
        for key in store.keys_of(lease).await? {
            let Some((group, _)) = key.rsplit_once('/').filter(|_| key.starts_with(&elections))
            else {
                continue;
            };
            let listing = store
                .list(&Selector::Prefix(format!("{group}/")), None)
                .await?;
            let is_here = |entry: &&Entry| {
                entry
                    .key
                    .rsplit_once('/')
                    .is_some_and(|(of, _)| of == group)
            };
            let candidates = listing.entries.iter().filter(is_here);
            let first = candidates.min_by_key(|entry| entry.create_revision);
            if first.is_some_and(|first| first.key == key) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Moves leadership to a node, which has to be a candidate: the leader ends its term and hands over, so that there
    /// is no time without a leader, and the candidates between them make way. A node with a
    /// [priority](crate::ClusterNodeBuilder::priority) may take it back later. Returns the fencing token of the new
    /// term. The leader and those between have to be nodes of this crate.
    ///
    /// Dropping the future does not take the request back: for up to 10 s the leader may follow it, and other transfers
    /// are refused.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain); when the node is no candidate, another transfer is under way, or it has not led
    /// `within` this time.
    pub async fn transfer(&self, id: &str, within: Duration) -> Result<Revision, ClusterError> {
        let store = self.store()?;
        let registered = self.registered(&*store, id).await?;
        let target = match registered.entry.lease {
            Some(lease) => self.keys.candidacy(lease),
            None => return Err(refused(id, "it has no lease, so it cannot lead")),
        };
        let candidates = self.candidates(&*store).await?;
        let Some(candidacy) = candidates.iter().find(|entry| entry.key == target) else {
            return Err(refused(id, "it is not a candidate"));
        };
        let created = candidacy.create_revision;
        if candidates
            .first()
            .is_some_and(|leader| leader.key == target)
        {
            return Ok(created);
        }
        let lease = store.grant(REQUEST_TTL).await?;
        let asked = Asked {
            id,
            registered: &registered,
            candidacy: &target,
            created,
        };
        let result = self.request(&*store, lease, asked, within).await;
        // The request goes with it; otherwise it ends after its time.
        let _ = store.revoke(lease.id).await;
        result
    }

    async fn request(
        &self,
        store: &dyn Store,
        lease: Lease,
        asked: Asked<'_>,
        within: Duration,
    ) -> Result<Revision, ClusterError> {
        let Asked { id, created, .. } = asked;
        let target = asked.candidacy;
        let key = self.keys.operator_request();
        let txn = Txn::new().when(Condition::Absent(key.clone())).put(
            key,
            operators_request(target, created),
            Some(lease.id),
        );
        if store.txn(txn).await?.is_none() {
            return Err(refused(id, "another operator is transferring leadership"));
        }
        let mut keeper = store.keeper(lease);
        let start = Instant::now();
        let mut renewed = start;
        while start.elapsed() < within {
            tokio::time::sleep(LOOK_EVERY).await;
            if renewed.elapsed() >= RENEW_EVERY {
                keeper.renew(RENEW_EVERY).await?;
                renewed = Instant::now();
            }
            let candidates = self.candidates(store).await?;
            if candidates
                .first()
                .is_some_and(|leader| leader.key == target)
            {
                return Ok(created);
            }
            if !candidates.iter().any(|entry| entry.key == target) {
                return Err(refused(id, "it has just left the election"));
            }
            // The leader would end its term in vain for a process that has been replaced.
            let now = self.registered(store, id).await?;
            if now.entry.lease != asked.registered.entry.lease {
                return Err(refused(id, "another process has just taken its place"));
            }
        }
        let reason = "the leader has not handed over in time: perhaps it or a candidate ahead is no node of this \
                      crate, or may not read the requests under handover/";
        Err(refused(id, reason))
    }

    fn store(&self) -> Result<Arc<dyn Store>, ClusterError> {
        self.cluster.store()
    }

    async fn registered(&self, store: &dyn Store, id: &str) -> Result<Registered, ClusterError> {
        check_node_id(id)?;
        let key = self.keys.registration(id);
        let listing = store.list(&Selector::Key(key.clone()), None).await?;
        match listing.entries.into_iter().next() {
            Some(entry) => Ok(Registered { key, entry }),
            None => Err(ClusterError::NotRegistered {
                node: id.to_owned(),
                group: self.group.clone(),
            }),
        }
    }

    /// The queue, the leader first.
    async fn candidates(&self, store: &dyn Store) -> Result<Vec<Entry>, ClusterError> {
        let prefix = Selector::Prefix(self.keys.election_prefix().to_owned());
        let mut candidates = store.list(&prefix, None).await?.entries;
        candidates.retain(|entry| self.keys.is_candidacy(&entry.key));
        candidates.sort_by_key(|entry| entry.create_revision);
        Ok(candidates)
    }
}

fn refused(id: &str, reason: &str) -> ClusterError {
    ClusterError::OperationRefused {
        node: id.to_owned(),
        reason: reason.to_owned(),
    }
}
