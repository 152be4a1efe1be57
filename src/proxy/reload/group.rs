//! A group that is about to be served, or to be served in another way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::difference::have_one_discovery;
use crate::cluster::Cluster;
use crate::config::{ClusterConfig, READY_TIMEOUT};
use crate::discovery::DiscoveryStatus;
use crate::error::ClusterError;
use crate::pingora::{BalancerService, Checker, LearnedFile, NodeCheck};
use crate::proxy::group::{GroupProxy, SameSettings, backend_tls};
use crate::proxy::learned;
use crate::proxy::tls::Reload;

/// The tasks of a group; dropping them ends them.
#[derive(Default)]
pub(super) struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Tasks {
    pub(super) fn push(&mut self, task: JoinHandle<()>) {
        self.0.push(task);
    }

    /// Ends them, and waits until they have ended.
    pub(super) async fn end(mut self) {
        for task in &mut self.0 {
            task.abort();
            // An error says that it was aborted.
            let _ = task.await;
        }
    }
}

/// A group as it is now.
pub(super) struct Former<'a> {
    pub(super) config: &'a ClusterConfig,
    pub(super) proxy: &'a Arc<GroupProxy>,
}

/// A group as it will be.
pub(super) struct Prepared {
    pub(super) proxy: Arc<GroupProxy>,
    /// `None` if the checks stay as they are.
    checker: Option<Option<Checker>>,
    change: Change,
}

/// What has to happen to its balancer.
enum Change {
    /// It is as it was.
    None,
    /// Its settings may be other ones.
    Settings,
    /// It follows other nodes, or the same ones in another way; or it is new. These tasks follow them already.
    Nodes(Tasks),
}

/// Makes what is needed for a group, and changes nothing of it. `config` is as if it were of this group alone.
pub(super) fn prepare(
    name: &str,
    config: &ClusterConfig,
    former: Option<&Former<'_>>,
    cluster: &Cluster,
    certificates: &Reload,
) -> Result<Prepared, ClusterError> {
    if let Some(former) = former
        && former.config == config
    {
        let proxy = former.proxy.clone();
        return Ok(Prepared {
            proxy,
            checker: None,
            change: Change::None,
        });
    }
    let (balancer, change) = balancer(config, former, cluster)?;
    // Under the name of another group they would be wrong.
    let same_group = former.filter(|former| former.config.group == config.group);
    let statistics = same_group.map(|former| former.proxy.statistics.clone());
    let tls = backend_tls(config, name)?;
    if let Some(tls) = &tls {
        certificates.add(&tls.files());
    }
    let mut proxy = GroupProxy::new(name, config, balancer, tls, statistics.unwrap_or_default());
    let are_peers_same = former.is_some_and(|former| {
        let old = former.config;
        old.spoken_to() == config.spoken_to()
            && old.timeouts == config.timeouts
            && old.clients.upgrade == config.clients.upgrade
    });
    if let Some(former) = former {
        let is_same = SameSettings {
            overload: former.config.overload == config.overload,
            retry: former.config.retry == config.retry,
            peers: are_peers_same,
        };
        proxy.continue_from(former.proxy, is_same);
    }
    let check = config
        .health_check
        .clone()
        .map(NodeCheck::new)
        .transpose()?;
    let are_checks_same = are_peers_same
        && former.is_some_and(|former| former.config.health_check == config.health_check);
    Ok(Prepared {
        checker: (!are_checks_same).then(|| proxy.checker(check)),
        proxy: Arc::new(proxy),
        change,
    })
}

/// The balancer of a group, and what has to happen to it.
fn balancer(
    config: &ClusterConfig,
    former: Option<&Former<'_>>,
    cluster: &Cluster,
) -> Result<(Arc<BalancerService>, Change), ClusterError> {
    // At a start, 0 says that nobody waits; nodes that nobody knows cannot be taken over.
    let ready_timeout = match (config.ready_timeout_ms, former.is_some()) {
        (0, true) => READY_TIMEOUT,
        (milliseconds, _) => Duration::from_millis(milliseconds),
    };
    let balancer = match former {
        Some(former) if have_one_discovery(former.config, config) => {
            return Ok((former.proxy.balancer.clone(), Change::Settings));
        }
        Some(former) => {
            let status = former.proxy.balancer.discovery().status();
            if matches!(status, DiscoveryStatus::Stale { .. }) {
                // The file of a snapshot, if there is one, has no leader, and is older than what is known.
                let reason = "what follows its nodes has changed, and etcd is away: it is tried again until etcd is back";
                return Err(ClusterError::config(
                    format!("cluster.groups.{}", former.proxy.name),
                    reason,
                ));
            }
            let discovery = config.discovery_over(cluster)?;
            former.proxy.balancer.over(discovery, ready_timeout)
        }
        None => {
            let discovery = config.discovery_over(cluster)?;
            BalancerService::new(discovery, config.balancer()?).ready_timeout(ready_timeout)
        }
    };
    let file = config.learned_file();
    let file = file.map(|(path, interval)| LearnedFile { path, interval });
    let balancer = balancer.maybe_learned_file(file);
    Ok((Arc::new(balancer), Change::Nodes(Tasks::default())))
}

impl Prepared {
    /// The group of a start, which does not run yet.
    pub(super) fn first(self) -> Arc<GroupProxy> {
        if let Some(checker) = self.checker {
            self.proxy.balancer.set_checker(checker);
        }
        learned::include(&self.proxy.balancer);
        self.proxy
    }

    /// Begins to follow other nodes, if there are any.
    pub(super) fn follow(&mut self, runtime: &Handle) {
        if let Change::Nodes(tasks) = &mut self.change {
            let balancer = self.proxy.balancer.clone();
            tasks.push(runtime.spawn(async move { balancer.follow().await }));
        }
    }

    /// Waits until the nodes are known. An error says that they are not in time.
    pub(super) async fn until_ready(&self) -> Result<(), ClusterError> {
        let balancer = &self.proxy.balancer;
        match &self.change {
            Change::Nodes(_) if !balancer.is_ready_in_time().await => {
                let group = balancer.discovery().group_name();
                let reason = format!(
                    "there is no view of the group {group:?} within cluster.ready_timeout_ms"
                );
                Err(ClusterError::config(
                    format!("cluster.groups.{}", self.proxy.name),
                    reason,
                ))
            }
            _ => Ok(()),
        }
    }

    /// The balancer works as it has to from now on. Returns the group's tasks.
    pub(super) async fn commit(
        self,
        config: &ClusterConfig,
        former: Option<Tasks>,
        runtime: &Handle,
    ) -> Result<Tasks, ClusterError> {
        let balancer = &self.proxy.balancer;
        learned::include(balancer);
        if let Some(checker) = self.checker {
            balancer.set_checker(checker);
        }
        match self.change {
            Change::None => Ok(former.unwrap_or_default()),
            Change::Settings => {
                balancer.reconfigure(config.weights(), Instant::now())?;
                Ok(former.unwrap_or_default())
            }
            Change::Nodes(mut tasks) => {
                if let Some(former) = former {
                    // They feed the same balancer.
                    former.end().await;
                }
                balancer.reconfigure(config.weights(), Instant::now())?;
                balancer.begin_with_followed();
                let balancer = balancer.clone();
                tasks.push(runtime.spawn(async move { balancer.run(None).await }));
                Ok(tasks)
            }
        }
    }
}
