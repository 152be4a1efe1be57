//! The listener of its own.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ::pingora::server::{Server, ShutdownWatch};
use ::pingora::services::background::{BackgroundService, background_service};
use async_trait::async_trait;
use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

use super::events::{Event, Events};
use super::group::Group;
use super::listener::LimitedListener;
use super::router::router;
use super::shown::Shown;
use super::status::Status;
use crate::config::{self, ClusterConfig};
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::proxy::{ProxyParts, Shutdown};

/// How often to try to listen: the predecessor has the address until it ends.
const RETRY: Duration = Duration::from_millis(200);
/// Open pages at one time.
const PAGES: usize = 128;
/// How often to look whether there are other groups.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// The page, the JSON and the metrics of some groups: a background service for a Pingora server, or a
/// router of axum 0.8.
pub struct Admin {
    options: config::Admin,
    token: Option<String>,
    groups: Vec<Group>,
    proxy: Option<ProxyParts>,
    started: SystemTime,
}

impl Admin {
    /// Shows nothing yet. The options say where the service listens, and with which token something may be changed.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field: an address that others reach without
    /// `public: true`, a token that is short or not there.
    pub fn try_new(options: config::Admin) -> Result<Self, ClusterError> {
        Self::with_field(options, "admin")
    }

    fn with_field(options: config::Admin, field: &str) -> Result<Self, ClusterError> {
        options.validate(field)?;
        Ok(Self {
            token: options.token(field)?,
            options,
            groups: Vec::new(),
            proxy: None,
            started: SystemTime::now(),
        })
    }

    /// Shows this group, too.
    #[must_use]
    pub fn group(mut self, group: Group) -> Self {
        self.groups.push(group);
        self
    }

    /// Shows all groups and routes of a bundled proxy, also those that come with a reload.
    #[must_use]
    pub fn proxy(mut self, parts: &ProxyParts) -> Self {
        self.proxy = Some(parts.clone());
        self
    }

    fn shown(&self) -> Arc<Shown> {
        Arc::new(Shown {
            options: self.options.clone(),
            token: self.token.clone(),
            fixed: self.groups.clone(),
            proxy: self.proxy.clone(),
            events: Events::default(),
            pages: Arc::new(Semaphore::new(PAGES)),
            started: self.started,
            told: std::sync::Mutex::default(),
        })
    }

    /// What the path `/api/v1/status` tells, now.
    pub fn status(&self) -> Status {
        self.shown().status()
    }

    /// The paths as a router, for a listener of your own. It shows no events of the groups.
    pub fn router(&self) -> Router {
        router(self.shown())
    }

    async fn serve(&self) -> io::Result<()> {
        let shown = self.shown();
        let mut following = JoinSet::new();
        following.spawn(follow_all(shown.clone()));
        let listener = self.listen().await;
        info!(listen = %self.options.listen, "the admin page is served");
        axum::serve(LimitedListener::new(listener), router(shown))
            .with_graceful_shutdown(closing())
            .await
    }

    async fn listen(&self) -> TcpListener {
        let mut is_logged = false;
        loop {
            let error = match TcpListener::bind(self.options.listen).await {
                Ok(listener) => return listener,
                Err(error) => error,
            };
            if !is_logged {
                let listen = self.options.listen;
                warn!(%listen, %error, "the admin page cannot be served yet, trying again");
                is_logged = true;
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// A successor listens here as soon as this process accepts nothing any more. Open pages stay open.
async fn closing() {
    while !Shutdown::of_process().has_closed() {
        tokio::time::sleep(RETRY).await;
    }
}

/// Keeps what happens in all groups, whichever there are.
async fn follow_all(shown: Arc<Shown>) {
    let mut followed: Vec<(Group, AbortHandle)> = Vec::new();
    let mut tasks = JoinSet::new();
    loop {
        let groups = shown.groups();
        let is_same = |one: &Group, other: &Group| Arc::ptr_eq(&one.balancer, &other.balancer);
        followed.retain(|(old, task)| {
            let stays = groups.iter().any(|new| is_same(old, new));
            if !stays {
                task.abort();
            }
            stays
        });
        while tasks.try_join_next().is_some() {}
        for new in groups {
            if !followed.iter().any(|(old, _)| is_same(old, &new)) {
                let task = tasks.spawn(follow(new.clone(), shown.clone()));
                followed.push((new, task));
            }
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

async fn follow(group: Group, shown: Arc<Shown>) {
    let mut events = group.balancer.discovery().subscribe();
    loop {
        match events.recv().await {
            Ok(event) => shown
                .events
                .add(Event::now(group.name(), event.to_string())),
            Err(tokio::sync::broadcast::error::RecvError::Lagged(missed)) => {
                let text = format!("{missed} events were too many to be shown");
                shown.events.add(Event::now(group.name(), text));
            }
            Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
        }
    }
}

#[async_trait]
impl BackgroundService for Admin {
    async fn start(&self, _: ShutdownWatch) {
        // Until the runtime ends: the page shows how the process drains.
        if let Err(error) = self.serve().await {
            warn!(%error, "the admin page is not served any more");
        }
    }
}

/// Adds the page to a server, if the file wants it: for the proxy that
/// [`ClusterProxy::add_to`](crate::proxy::ClusterProxy::add_to) has added.
///
/// # Errors
///
/// When the address cannot be listened on, unless the server is to take over sockets or only to be tested.
pub fn add_to(
    server: &mut Server,
    config: &ClusterConfig,
    parts: &ProxyParts,
) -> Result<(), ClusterError> {
    let Some(options) = &config.admin else {
        return Ok(());
    };
    let admin = Admin::with_field(options.clone(), "cluster.admin")?.proxy(parts);
    let is_free_later = server
        .options
        .as_ref()
        .is_some_and(|options| options.upgrade || options.test);
    if !is_free_later {
        let listener = std::net::TcpListener::bind(options.listen);
        listener.map_err(|error| {
            let reason = format!("{}: {error}", options.listen);
            ClusterError::config("cluster.admin.listen", reason)
        })?;
    }
    server.add_service(background_service("admin", admin));
    parts.reloader.shows();
    Ok(())
}

opaque_debug!(Admin);
