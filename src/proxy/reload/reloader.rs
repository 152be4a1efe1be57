//! The service that runs the groups, and takes over another configuration.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ::pingora::server::ShutdownWatch;
use ::pingora::services::ServiceReadyNotifier;
use ::pingora::services::background::BackgroundService;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::{Span, error, info, info_span, warn};

use super::difference::{AtStart, check_listeners_of_routes, usable};
use super::group::{Former, Prepared, Tasks, prepare};
use super::status::{ReloadStatus, Reloaded};
use crate::cluster::Cluster;
use crate::config::{ClusterConfig, DEFAULT_GROUP, ListenerAt};
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::operator::Operator;
use crate::pingora::BalancerService;
use crate::proxy::CertificateFile;
use crate::proxy::client_settings::front_settings;
use crate::proxy::front::{FrontListener, FrontSettings};
use crate::proxy::group::GroupProxy;
use crate::proxy::route::Route;
use crate::proxy::routing::Routing;
use crate::proxy::statistics::RequestStatistics;
use crate::proxy::tls::Reload;
use crate::supervise::{in_span, new_span, say};
use crate::sync::lock;

/// The configuration that is in use, and taking over another one. No connection and no request ends with
/// that: those that have begun go on by the old one, and what was learned of nodes that stay is not forgotten.
///
/// [`ProxyParts`](super::super::ProxyParts) has one. [`ConfigFile`](super::ConfigFile) uses it when a file
/// changes and at SIGHUP.
pub struct Reloader {
    cluster: Cluster,
    routing: Arc<ArcSwap<Routing>>,
    front: OnceLock<Arc<ArcSwap<FrontSettings>>>,
    certificates: Reload,
    /// Asks for a reload from the file.
    file: OnceLock<mpsc::Sender<Ask>>,
    runtime: OnceLock<Handle>,
    /// Of several reloads one runs at a time.
    running: tokio::sync::Mutex<Running>,
    status: Mutex<ReloadStatus>,
    /// As the program has asked for at the start.
    writes_to_leader: bool,
    at_start: AtStart,
    /// The page is served, if the file describes it.
    is_shown: AtomicBool,
}

/// A wish that the file is read and taken over, and where the answer goes.
pub(super) type Ask = oneshot::Sender<Result<Reloaded, ClusterError>>;

/// A group that is served.
#[derive(Clone)]
#[non_exhaustive]
pub struct ServedGroup {
    /// As the file names it; the group of the section itself by its name in etcd.
    pub name: String,
    /// Its balancer.
    pub balancer: Arc<BalancerService>,
    /// What has become of its requests.
    pub requests: Arc<RequestStatistics>,
}

/// A route that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServedRoute {
    /// As the file names it, or `route-N`.
    pub name: String,
    /// How many requests it has been for.
    pub requests: u64,
}

struct Running {
    config: ClusterConfig,
    tasks: BTreeMap<String, Tasks>,
}

/// The names of all groups of a configuration, and each as if it were alone.
fn groups(config: &ClusterConfig) -> impl Iterator<Item = (&str, ClusterConfig)> {
    let names = config.groups.keys().map(String::as_str);
    let names = std::iter::once(DEFAULT_GROUP).chain(names);
    names.filter_map(|name| Some((name, config.of_group(name)?)))
}

impl Reloader {
    /// The groups of a configuration, which do not run yet.
    pub(in crate::proxy) fn new(
        config: &ClusterConfig,
        certificates: Reload,
    ) -> Result<Self, ClusterError> {
        let cluster = Cluster::connect(config.etcd.clone())?;
        let mut proxies = BTreeMap::new();
        for (name, config) in groups(config) {
            let prepared = prepare(name, &config, None, &cluster, &certificates)?;
            proxies.insert(name.to_owned(), prepared.first());
        }
        let routing = Routing::new(config, proxies, None)?;
        if let Some(tls) = &config.etcd.tls {
            let named = [
                ("cluster.etcd.tls.ca_file", &tls.ca_file),
                ("cluster.etcd.tls.cert_file", &tls.cert_file),
            ];
            let named = named.into_iter();
            certificates.show(named.filter_map(|(field, file)| Some((field, file.as_deref()?))));
        }
        Ok(Self {
            cluster,
            routing: Arc::new(ArcSwap::from_pointee(routing)),
            front: OnceLock::new(),
            certificates,
            file: OnceLock::new(),
            runtime: OnceLock::new(),
            running: tokio::sync::Mutex::new(Running {
                config: config.clone(),
                tasks: BTreeMap::new(),
            }),
            status: Mutex::new(ReloadStatus::new()),
            writes_to_leader: false,
            at_start: AtStart::of(config),
            is_shown: AtomicBool::new(config.admin.is_none()),
        })
    }

    /// The page that the file describes is served.
    #[cfg(feature = "admin")]
    pub(crate) fn shows(&self) {
        self.is_shown.store(true, Ordering::Relaxed);
    }

    /// Writes go to the leader of the first group, whatever a new configuration says.
    pub(in crate::proxy) fn writes_to_leader(mut self, writes_to_leader: bool) -> Self {
        self.writes_to_leader = writes_to_leader;
        self
    }

    /// What is served now.
    pub(in crate::proxy) fn routing(&self) -> &Arc<ArcSwap<Routing>> {
        &self.routing
    }

    /// These settings of the front follow.
    pub(in crate::proxy) fn set_front(&self, front: Arc<ArcSwap<FrontSettings>>) {
        // There is one front for each.
        let _ = self.front.set(front);
    }

    /// The groups that are served now.
    pub fn groups(&self) -> Vec<ServedGroup> {
        let routing = self.routing.load();
        let served = |group: &Arc<GroupProxy>| ServedGroup {
            name: match group.name.as_str() {
                DEFAULT_GROUP => group.balancer.discovery().group_name().to_owned(),
                name => name.to_owned(),
            },
            balancer: group.balancer.clone(),
            requests: group.statistics.clone(),
        };
        // The first one first.
        let others = routing.groups.values();
        let others = others.filter(|group| group.name != DEFAULT_GROUP);
        std::iter::once(&routing.default)
            .chain(others)
            .map(served)
            .collect()
    }

    /// An operator of the group with this name, as [`groups`](Self::groups) names it; `None` if it is not served.
    pub fn operator(&self, name: &str) -> Option<Result<Operator, ClusterError>> {
        let groups = self.groups();
        let group = groups.into_iter().find(|group| group.name == name)?;
        let discovery = group.balancer.discovery();
        if !discovery.is_ours() {
            return Some(Err(ClusterError::config(
                "registry",
                "others write the nodes of this group: operators cannot speak of them",
            )));
        }
        Some(Operator::new(&self.cluster, discovery.group_name()))
    }

    /// The routes that are in use now, in their order.
    pub fn routes(&self) -> Vec<ServedRoute> {
        let routing = self.routing.load();
        let served = |route: &Arc<Route>| ServedRoute {
            name: route.name.clone(),
            requests: route.requests(),
        };
        routing.routes.iter().map(served).collect()
    }

    /// Where a reload from the file is asked for from now on.
    pub(super) fn follow_file(&self) -> mpsc::Receiver<Ask> {
        let (asks, asked) = mpsc::channel(1);
        // A program follows one file.
        let _ = self.file.set(asks);
        asked
    }

    /// Reads the file again, if a [`ConfigFile`](super::ConfigFile) follows one, and takes it over.
    ///
    /// # Errors
    ///
    /// As [`reload`](Self::reload); also when there is no file, or it cannot be read.
    pub async fn reload_file(&self) -> Result<Reloaded, ClusterError> {
        let none = || ClusterError::config("cluster", "no file is followed");
        let (ask, answer) = oneshot::channel();
        let asks = self.file.get().ok_or_else(none)?;
        asks.send(ask).await.map_err(|_| none())?;
        answer.await.map_err(|_| none())?
    }

    /// The certificate files that are in use for clients, backends and etcd (with the feature `proxy-tls`).
    pub fn certificates(&self) -> Vec<CertificateFile> {
        self.certificates.certificates()
    }

    /// What has become of reloads.
    pub fn status(&self) -> ReloadStatus {
        lock(&self.status).clone()
    }

    /// Takes over another configuration. One that needs a restart in some field is taken over in the rest.
    /// If another reload runs, this one waits for it. Dropping the future does not end it.
    ///
    /// A group that is new, or that follows other nodes, has to have a view within
    /// [`ready_timeout_ms`](ClusterConfig::ready_timeout_ms).
    ///
    /// # Errors
    ///
    /// When the configuration is invalid, one of its files cannot be used, a group has no view in time, or the
    /// server does not run yet. Then nothing has changed.
    pub async fn reload(
        self: &Arc<Self>,
        config: &ClusterConfig,
    ) -> Result<Reloaded, ClusterError> {
        self.reload_with(config, Vec::new()).await
    }

    /// The same, where these fields beside it need a restart.
    pub(super) async fn reload_with(
        self: &Arc<Self>,
        config: &ClusterConfig,
        also: Vec<String>,
    ) -> Result<Reloaded, ClusterError> {
        let span = new_span(|| info_span!("reload"));
        let reload = async {
            let mut result = self.take_over(config.clone()).await;
            if let Ok(reloaded) = &mut result {
                reloaded.needs_restart.extend(also);
            }
            self.report(result.as_ref().map_err(ToString::to_string));
            result
        };
        in_span(&span, reload).await
    }

    /// A configuration has been refused before it came this far.
    pub(super) fn refuse(&self, error: &ClusterError) {
        self.report(Err(error.to_string()));
    }

    fn report(&self, result: Result<&Reloaded, String>) {
        say(|| match &result {
            Ok(reloaded) => {
                match reloaded.is_changed {
                    true => info!("the new configuration is in use"),
                    false => info!("the configuration has not changed"),
                }
                if !reloaded.needs_restart.is_empty() {
                    let fields = reloaded.needs_restart.join(", ");
                    warn!(fields, "these fields take effect only after a restart");
                }
            }
            Err(error) => error!(
                error,
                "the new configuration is refused; the former one is still in use"
            ),
        });
        lock(&self.status).add(result);
    }

    async fn take_over(self: &Arc<Self>, config: ClusterConfig) -> Result<Reloaded, ClusterError> {
        config.validate()?;
        let Some(runtime) = self.runtime.get() else {
            return Err(ClusterError::config(
                "cluster",
                "the server does not run yet",
            ));
        };
        let reloader = self.clone();
        let change = async move { reloader.change(config).await };
        // In a task of its own, so that nobody can stop it half way.
        let ended = runtime.spawn(in_span(&Span::current(), change)).await;
        ended.unwrap_or_else(|panic| {
            let reason = format!("taking it over failed: {panic}");
            Err(ClusterError::config("cluster", reason))
        })
    }

    async fn change(&self, mut config: ClusterConfig) -> Result<Reloaded, ClusterError> {
        config.leader.writes |= self.writes_to_leader;
        config.check_leaders()?;
        let mut running = self.running.lock().await;
        let (used, needs_restart) = usable(&running.config, &config, self.at_start);
        check_listeners_of_routes(&used, &running.config, &config)?;
        let config = used;
        if config == running.config {
            return Ok(Reloaded {
                is_changed: false,
                needs_restart,
            });
        }
        let runtime = Handle::current();
        let routing = self.routing.load_full();
        let listeners = self.listeners(&config, &running.config)?;
        let mut prepared = Vec::new();
        for (name, new) in groups(&config) {
            let old = running.config.of_group(name);
            let former = old.as_ref().zip(routing.groups.get(name));
            let former = former.map(|(config, proxy)| Former { config, proxy });
            let group = prepare(
                name,
                &new,
                former.as_ref(),
                &self.cluster,
                &self.certificates,
            )?;
            prepared.push((name.to_owned(), new, group));
        }
        let proxies = prepared.iter();
        let proxies = proxies.map(|(name, _, group)| (name.clone(), group.proxy.clone()));
        let new_routing = Routing::new(&config, proxies.collect(), Some(&routing))?;
        until_ready(&mut prepared, &runtime).await?;

        // From here on nothing can fail that has not been checked.
        let mut former = std::mem::take(&mut running.tasks);
        for (name, config, group) in prepared {
            let tasks = group
                .commit(&config, former.remove(&name), &runtime)
                .await?;
            running.tasks.insert(name, tasks);
        }
        self.routing.store(Arc::new(new_routing));
        if let Some(front) = self.front.get() {
            let settings = front_settings(&config.clients, &config.timeouts, listeners);
            front.store(Arc::new(settings));
        }
        running.config = config;
        Ok(Reloaded {
            is_changed: true,
            needs_restart,
        })
    }

    /// Where clients connect, with the same TLS as before where nothing of it has changed.
    fn listeners(
        &self,
        new: &ClusterConfig,
        old: &ClusterConfig,
    ) -> Result<Vec<FrontListener>, ClusterError> {
        let former = self.front.get().map(|front| front.load_full());
        let former = former.as_ref().map_or(&[][..], |it| &it.listeners);
        let same = |listener: &ListenerAt<'_>| {
            let mut before = old.listeners().zip(former);
            let is_same =
                |it: &ListenerAt<'_>| (it.listen, it.tls) == (listener.listen, listener.tls);
            Some(before.find(|(old, _)| is_same(old))?.1.clone())
        };
        let listeners = new.listeners().map(|listener| match same(&listener) {
            Some(same) => Ok(same),
            None => {
                let made = FrontListener::new(&listener)?;
                if let Some(tls) = &made.tls {
                    self.certificates.add(&tls.files());
                }
                Ok(made)
            }
        });
        listeners.collect()
    }

    /// Runs the groups of the start.
    async fn start_groups(&self) {
        let runtime = Handle::current();
        let mut running = self.running.lock().await;
        for (name, group) in &self.routing.load().groups {
            let balancer = group.balancer.clone();
            let mut tasks = Tasks::default();
            tasks.push(runtime.spawn(async move { balancer.run(None).await }));
            running.tasks.insert(name.clone(), tasks);
        }
        // Reloads are possible from now on.
        let _ = self.runtime.set(runtime);
    }

    /// Waits for the first view of each group, and what operators say of its nodes, as long as that may take.
    async fn wait_for_views(&self) {
        let balancers = self.routing.load().balancers();
        let mut waiting = tokio::task::JoinSet::new();
        for balancer in balancers {
            waiting.spawn(async move {
                balancer.is_ready_in_time().await;
                balancer.catch_up();
            });
        }
        waiting.join_all().await;
    }
}

/// All groups follow their nodes, and wait for them at the same time.
async fn until_ready(
    prepared: &mut [(String, ClusterConfig, Prepared)],
    runtime: &Handle,
) -> Result<(), ClusterError> {
    for (_, _, group) in prepared.iter_mut() {
        group.follow(runtime);
    }
    for (_, _, group) in prepared.iter() {
        group.until_ready().await?;
    }
    Ok(())
}

#[async_trait]
impl BackgroundService for Reloader {
    async fn start_with_ready_notifier(&self, _: ShutdownWatch, ready: ServiceReadyNotifier) {
        if !self.is_shown.load(Ordering::Relaxed) {
            say(|| {
                warn!(
                    "cluster.admin is given, but the program does not call pingora_etcd::admin::add_to"
                );
            });
        }
        self.start_groups().await;
        self.wait_for_views().await;
        ready.notify_ready();
        // The tasks run until the runtime ends.
        std::future::pending::<()>().await;
    }
}

opaque_debug!(Reloader, ServedGroup);
