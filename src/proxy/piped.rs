//! The bundled proxy over pipes instead of sockets, so that tests can feed it with any bytes.

use std::sync::Arc;

use ::pingora::apps::ServerApp;
use ::pingora::proxy::HttpProxy;
use ::pingora::server::configuration::ServerConf;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::watch;

use super::client_settings::{front_settings, server_options};
use super::cluster_proxy::ClusterProxy;
use super::front::{Front, FrontCounts, FrontListener, FrontStatistics};
use super::server::made;
use crate::config::ClusterConfig;
use crate::error::ClusterError;
use crate::pingora::BalancerService;

/// The bytes that a pipe holds.
const PIPE: usize = 4_096;

/// A proxy with its front, and without backends.
#[doc(hidden)]
pub struct PipedProxy {
    front: Arc<Front<HttpProxy<ClusterProxy>>>,
    statistics: Arc<FrontStatistics>,
}

impl PipedProxy {
    /// # Errors
    ///
    /// When `config` is invalid.
    pub fn new(config: &ClusterConfig) -> Result<Self, ClusterError> {
        let balancer = BalancerService::new(config.discovery()?, config.balancer()?);
        let proxy = ClusterProxy::try_new(Arc::new(balancer), config)?;
        let mut app = made(&Arc::new(ServerConf::default()), proxy)?;
        app.server_options = Some(server_options(&config.clients));
        let statistics = Arc::<FrontStatistics>::default();
        let front = Front::new(
            app,
            front_settings(
                &config.clients,
                &config.timeouts,
                FrontListener::all(config.listeners())?,
            ),
            statistics.clone(),
            None,
        );
        Ok(Self {
            front: Arc::new(front),
            statistics,
        })
    }

    /// Sends these parts, and then ends the client's side or keeps it open. Returns what the client
    /// received until the proxy ended the connection.
    pub async fn exchange(&self, parts: &[&[u8]], ends: bool) -> Vec<u8> {
        let (client, server) = duplex(PIPE);
        let (mut from_proxy, mut to_proxy) = tokio::io::split(client);
        let (_running, shutdown) = watch::channel(false);
        let serving = self.front.process_new(Box::new(server), &shutdown);
        let sending = async {
            for part in parts {
                // The proxy may have ended the connection.
                if to_proxy.write_all(part).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            if ends {
                let _ = to_proxy.shutdown().await;
            }
        };
        let receiving = async {
            let mut received = Vec::new();
            // An error is an end, too.
            let _ = from_proxy.read_to_end(&mut received).await;
            received
        };
        let (_, (), received) = tokio::join!(serving, sending, receiving);
        received
    }

    /// What the front has counted.
    pub fn counts(&self) -> FrontCounts {
        self.statistics.counts()
    }
}
