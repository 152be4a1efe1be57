//! Builds a discovery, and checks its settings.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::admission::{Admission, EntryLimits, NodeFilter, parse_networks, parse_ports};
use super::format::{Places, Registry};
use super::handle::{ServiceDiscovery, Source};
use super::published::Published;
use super::self_preservation::SelfPreservation;
use super::settings::Settings;
use super::snapshot_file::SnapshotFile;
use crate::error::ClusterError;
use crate::keys;
use crate::lifecycle::Lifecycle;
use crate::store::{EtcdOptions, LazyStore, Store};

/// The default of the minimum time between two publications.
pub(crate) const PUBLISH_INTERVAL: Duration = Duration::from_millis(20);
const MAX_PUBLISH_INTERVAL: Duration = Duration::from_secs(10);

/// Builds a [`ServiceDiscovery`].
#[derive(Debug)]
pub struct ServiceDiscoveryBuilder {
    etcd: EtcdOptions,
    group: String,
    store: Option<Arc<dyn Store>>,
    /// The store that a [`Cluster`](crate::Cluster) shares.
    shared_store: Option<Arc<LazyStore>>,
    filter: NodeFilter,
    limits: EntryLimits,
    networks: Vec<String>,
    ports: Vec<String>,
    preserve: SelfPreservation,
    snapshot: Option<SnapshotFile>,
    publish_interval: Duration,
    places: Places,
    name_servers: Vec<String>,
}

impl ServiceDiscoveryBuilder {
    /// A builder for a view of this group.
    pub fn new(etcd: impl Into<EtcdOptions>, group_name: impl Into<String>) -> Self {
        Self {
            etcd: etcd.into(),
            group: group_name.into(),
            store: None,
            shared_store: None,
            filter: NodeFilter::default(),
            limits: EntryLimits::default(),
            networks: Vec::new(),
            ports: Vec::new(),
            preserve: SelfPreservation::default(),
            snapshot: None,
            publish_interval: PUBLISH_INTERVAL,
            places: Places::default(),
            name_servers: Vec::new(),
        }
    }

    /// Reads entries that others write, such as those of gRPC, go-zero or Kratos. Default: this crate's own format.
    #[must_use]
    pub fn registry(mut self, registry: Registry) -> Self {
        self.places.main = registry;
        self
    }

    /// Reads entries of the same group in further registries, such as while a fleet moves from one to another. Their
    /// nodes have the name of the format in front of their ids, as in `kratos:0b9c`. Two entries with one address are
    /// one backend, and what [`registry`](Self::registry) says of it counts. Default: none.
    #[must_use]
    pub fn further_registries(mut self, registries: impl IntoIterator<Item = Registry>) -> Self {
        self.places.further = registries.into_iter().collect();
        self
    }

    /// Resolves host names with these servers, `address:port`. Default: with those of the system.
    #[must_use]
    pub fn name_servers(mut self, servers: impl IntoIterator<Item = String>) -> Self {
        self.name_servers = servers.into_iter().collect();
        self
    }

    /// Selects the nodes by zone and tags. Default: all nodes.
    #[must_use]
    pub fn filter(mut self, filter: NodeFilter) -> Self {
        self.filter = filter;
        self
    }

    /// Accepts only nodes with an address in one of these networks (`10.0.0.0/8`, `fd00::/8`, or a
    /// single address). Whoever can write to the store can direct traffic anywhere; this limits where
    /// it may go. Other nodes are skipped, counted ([`ServiceDiscovery::rejected_entries`]), and logged
    /// once. Default: all addresses.
    #[must_use]
    pub fn allowed_networks<T: Into<String>>(
        mut self,
        networks: impl IntoIterator<Item = T>,
    ) -> Self {
        self.networks = networks.into_iter().map(Into::into).collect();
        self
    }

    /// Accepts only nodes with one of these ports (`8080`, or `9000-9100`). Nodes that registered no
    /// port are accepted, and reached at the reader's default port. Default: all ports.
    #[must_use]
    pub fn allowed_ports<T: Into<String>>(mut self, ports: impl IntoIterator<Item = T>) -> Self {
        self.ports = ports.into_iter().map(Into::into).collect();
        self
    }

    /// Limits the size of an entry, and the number of entries.
    #[must_use]
    pub fn limits(mut self, limits: EntryLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets when nodes are kept although their leases are gone. Default: on.
    #[must_use]
    pub fn self_preservation(mut self, preserve: SelfPreservation) -> Self {
        self.preserve = preserve;
        self
    }

    /// Saves the nodes in this file, and serves them after a start without the store. When a run ends,
    /// it writes the changes since the last write, which takes 1 s at most. Needs a runtime with
    /// threads for blocking work, as every Tokio runtime has. Default: none.
    #[must_use]
    pub fn snapshot_file(mut self, file: SnapshotFile) -> Self {
        self.snapshot = Some(file);
        self
    }

    /// Sets the minimum time between two publications. Changes within it are published together; a
    /// change of leader does not wait. Default: 20 ms. Range: 0 to 10 s.
    #[must_use]
    pub fn publish_interval(mut self, interval: Duration) -> Self {
        self.publish_interval = interval;
        self
    }

    /// Uses this store instead of opening one: to share a connection between nodes and discoveries of
    /// one runtime, or for tests. Of the etcd options only the key prefix then matters.
    #[must_use]
    pub fn store(mut self, store: Arc<dyn Store>) -> Self {
        self.store = Some(store);
        self
    }

    pub(crate) fn lazy_store(mut self, store: &Arc<LazyStore>) -> Self {
        self.shared_store = Some(store.clone());
        self
    }

    /// Checks all settings and builds the discovery. Does not connect yet.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig) or
    /// [`InvalidEndpoint`](ClusterError::InvalidEndpoint) with the setting that is wrong.
    pub fn try_build(self) -> Result<ServiceDiscovery, ClusterError> {
        let settings = self.settings()?;
        Ok(self.finish(Ok(settings)))
    }

    /// Builds the discovery. The errors of [`try_build`](Self::try_build) are returned by `run`
    /// instead.
    pub fn build(self) -> ServiceDiscovery {
        let settings = self.settings();
        self.finish(settings)
    }

    fn settings(&self) -> Result<Settings, ClusterError> {
        if self.store.is_none() && self.shared_store.is_none() {
            self.etcd.validate()?;
        } else {
            self.etcd.check_key_prefix()?;
        }
        keys::check_group(&self.group)?;
        self.limits.validate("limits")?;
        self.preserve.validate("self_preservation")?;
        self.places.validate()?;
        if let Some(file) = &self.snapshot {
            file.validate("snapshot")?;
        }
        if self.publish_interval > MAX_PUBLISH_INTERVAL {
            let reason = format!("{:?} is out of range, 0 to 10 s", self.publish_interval);
            return Err(ClusterError::config("publish_interval", reason));
        }
        let key_prefix = self.etcd.prefix();
        Ok(Settings {
            keys: self.places.keys(&key_prefix, &self.group)?,
            format: self.places.mark(&self.group),
            name_servers: parse_servers(&self.name_servers)?,
            key_prefix,
            admission: Admission {
                filter: self.filter.clone(),
                limits: self.limits,
                networks: parse_networks(&self.networks)?,
                ports: parse_ports(&self.ports)?,
                decoders: self.places.decoders(&self.group),
                names: Arc::default(),
            },
            preserve: self.preserve,
            snapshot: self.snapshot.clone(),
            publish_interval: self.publish_interval,
            serializable_fallback: self.etcd.serializable_fallback,
        })
    }

    fn finish(self, settings: Result<Settings, ClusterError>) -> ServiceDiscovery {
        let store = match (self.store, self.shared_store) {
            (None, Some(shared)) => shared,
            (store, _) => Arc::new(LazyStore::new(self.etcd, store)),
        };
        ServiceDiscovery {
            source: Arc::new(Source {
                group: self.group,
                settings,
                store,
                life: Lifecycle::default(),
            }),
            published: Arc::new(Published::new()),
        }
    }
}

fn parse_servers(texts: &[String]) -> Result<Vec<SocketAddr>, ClusterError> {
    let parse = |text: &String| {
        text.parse().map_err(|_| {
            let reason = format!("{text:?} is no address of a server, such as 10.0.0.2:53");
            ClusterError::config("name_servers", reason)
        })
    };
    texts.iter().map(parse).collect()
}

impl ServiceDiscovery {
    /// A view of this group. Prefer [`builder`](Self::builder), which reports a bad argument at once:
    /// here it is returned by [`run`](Self::run).
    pub fn new(etcd_endpoints: Vec<String>, group_name: String) -> Self {
        ServiceDiscoveryBuilder::new(etcd_endpoints, group_name).build()
    }

    /// A builder for a view of this group.
    pub fn builder(
        etcd: impl Into<EtcdOptions>,
        group_name: impl Into<String>,
    ) -> ServiceDiscoveryBuilder {
        ServiceDiscoveryBuilder::new(etcd, group_name)
    }
}
