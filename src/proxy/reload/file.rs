//! A file whose changes are taken over.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pingora::server::ShutdownWatch;
use ::pingora::services::background::BackgroundService;
use async_trait::async_trait;

use super::reloader::Reloader;
use super::status::Reloaded;
use crate::config::{self, ClusterConfig};
use crate::error::ClusterError;
use crate::opaque::opaque_debug;
use crate::proxy::shutdown::Shutdown;

/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// When a file is tried again that was refused for a reason that may pass.
const AGAIN: Duration = Duration::from_secs(15);

/// How long a file may be missing: it may be on its way from one place to another.
const MISSING_FOR: Duration = Duration::from_secs(5);

/// The file of a running load balancer: its changes are taken over within about two seconds, also when it is
/// replaced or the link to it changes, as Kubernetes does, and at once at SIGHUP. What is no file, such as a pipe, is
/// read at the start only. As a background service:
///
/// ```no_run
/// use pingora::services::background::background_service;
/// use pingora_etcd::config::{self, ClusterConfig};
/// use pingora_etcd::proxy::{ClusterProxy, ConfigFile};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let path = "load_balancer.yaml";
/// let text = config::read(path)?;
/// let cluster = ClusterConfig::from_yaml(&text, path)?;
/// let server_conf = config::server_conf(&text, path)?;
/// let mut server = pingora::server::Server::new_with_opt_and_conf(None, server_conf);
/// let parts = ClusterProxy::add_to(&mut server, &cluster, false)?;
/// let file = ConfigFile::new(path, text, parts.reloader.clone());
/// server.add_service(background_service("configuration", file));
/// # Ok(()) }
/// ```
pub struct ConfigFile {
    path: PathBuf,
    text: String,
    reloader: Arc<Reloader>,
}

impl ConfigFile {
    /// The file with this text, from which the configuration in use comes.
    pub fn new(path: impl Into<PathBuf>, text: String, reloader: Arc<Reloader>) -> Self {
        Self {
            path: path.into(),
            text,
            reloader,
        }
    }

    /// Takes a text over. Pingora's part of it needs a restart.
    async fn reload(&self, text: &str) -> Result<Reloaded, ClusterError> {
        let name = self.path.display().to_string();
        let read = || {
            let config = ClusterConfig::from_yaml(text, &name)?;
            let server = config::server_conf(text, &name)?;
            let before = config::server_conf(&self.text, &name)?;
            Ok((config, server.to_yaml() != before.to_yaml()))
        };
        let (config, is_server_changed) = match read() {
            Ok(read) => read,
            Err(error) => {
                self.reloader.refuse(&error);
                return Err(error);
            }
        };
        let mut also = Vec::new();
        if is_server_changed {
            let part = "what is outside of the section cluster";
            also.push(part.to_owned());
        }
        self.reloader.reload_with(&config, also).await
    }

    async fn read(&self) -> Result<String, ClusterError> {
        let path = self.path.clone();
        let reading = tokio::task::spawn_blocking(move || match path.metadata() {
            // It can be read once, and to open it may take for ever.
            Ok(about) if !about.is_file() => {
                let reason = format!("{} is no file, and was read at the start", path.display());
                Err(ClusterError::config("cluster", reason))
            }
            _ => config::read(path),
        });
        reading.await.unwrap_or_else(|panic| {
            let reason = format!("reading the file failed: {panic}");
            Err(ClusterError::config("cluster", reason))
        })
    }
}

#[async_trait]
impl BackgroundService for ConfigFile {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let mut hangups = Shutdown::of_process().follow_reloads();
        let mut asked = self.reloader.follow_file();
        // What was tried last, whether it was refused or not.
        let mut tried = self.text.clone();
        let mut seen = tried.clone();
        let mut again_at = None;
        // Since when it cannot be read, and whether that has been said.
        let mut unreadable: Option<(Instant, bool)> = None;
        loop {
            let mut answer = None;
            let is_asked = tokio::select! {
                _ = shutdown.changed() => return,
                Ok(()) = hangups.changed() => true,
                Some(ask) = asked.recv() => {
                    answer = Some(ask);
                    true
                }
                () = tokio::time::sleep(INTERVAL) => false,
            };
            let read = self.read().await;
            let is_still = read.as_ref().is_ok_and(|text| *text == seen);
            let result = match read {
                Ok(text) => {
                    // Whoever writes it may not be done, unless it is the same for a while.
                    let is_due = again_at.is_some_and(|at| Instant::now() >= at);
                    let is_new = is_still && (text != tried || is_due);
                    seen.clone_from(&text);
                    let was_refused =
                        is_still && unreadable.take().is_some_and(|(_, is_said)| is_said);
                    if !is_asked && !is_new && !was_refused {
                        continue;
                    }
                    tried.clone_from(&text);
                    let result = self.reload(&text).await;
                    // A text with an error stays wrong; a group without a view, or a file that is missing, may pass.
                    let is_final = matches!(&result, Ok(_) | Err(ClusterError::ConfigFile { .. }));
                    again_at = (!is_final).then(|| Instant::now() + AGAIN);
                    result
                }
                Err(error) => {
                    let (since, is_said) = unreadable.get_or_insert((Instant::now(), false));
                    // What is no file was never to be read again.
                    let is_file = matches!(error, ClusterError::ConfigFile { .. });
                    let is_due = is_file && !*is_said && since.elapsed() > MISSING_FOR;
                    if !is_asked && !is_due {
                        continue;
                    }
                    *is_said = true;
                    self.reloader.refuse(&error);
                    Err(error)
                }
            };
            if let Some(answer) = answer {
                // Whoever has asked may be gone.
                let _ = answer.send(result);
            }
        }
    }
}

opaque_debug!(ConfigFile);
