//! A proxy of one's own, behind the front of the bundled one.

use std::sync::Arc;
use std::time::Duration;

use ::pingora::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream};
use ::pingora::protocols::http::ServerSession;
use ::pingora::protocols::http::v2::server::H2Options;
use ::pingora::proxy::{HttpProxy, ProxyHttp, http_proxy};
use ::pingora::server::configuration::ServerConf;
use ::pingora::server::{Server, ShutdownWatch};
use ::pingora::services::ServiceHandle;
use ::pingora::services::background::background_service;
use async_trait::async_trait;

use super::access_log::AccessLog;
use super::client_settings::{front_settings, h2_options, server_options};
use super::front::{Connection, Front, FrontListener, FrontStatistics, Phase};
use super::phases::{Phases, follow_phases};
use super::server::{check_listeners, listening, tell_refused};
use super::shutdown::Shutdown;
use super::tls::Reload;
use crate::config::{Clients, ClusterConfig, Listener, Timeouts, check_all, listed};
use crate::error::{ClusterError, in_range};
use crate::pingora::with_system_cas;

/// Where clients connect, and what they may do: for [`add_proxy`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FrontConfig {
    /// 1 to 30 addresses, each with TLS or without. Default: none.
    pub listeners: Vec<Listener>,
    /// What clients may do. Of its fields those count that are about connections and the size of heads (over HTTP/1 one may
    /// be longer by what is read at once), and `headers` over HTTP/2; what is about bodies, upgrades, half-closed clients and `ready_path` is up to the proxy.
    pub clients: Clients,
    /// How long clients may take: the fields that begin with `client_`, and `tunnel_ms`.
    pub timeouts: Timeouts,
    /// For how long connections are accepted after SIGTERM: the longest one of the process holds, see
    /// [`Shutdown::accepts_for`]. Default: 5 s. Range: 0 to 600 s.
    pub drain_delay: Duration,
    /// Gets a line for each request that your proxy never sees, because it is late, too large or cannot be parsed; the lines
    /// of the others are up to the proxy. Default: none.
    pub access_log: Option<Arc<AccessLog>>,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            listeners: Vec::new(),
            clients: Clients::default(),
            timeouts: Timeouts::default(),
            drain_delay: Duration::from_secs(5),
            access_log: None,
        }
    }
}

impl FrontConfig {
    /// One address without TLS, with the default limits.
    pub fn new(listen: impl Into<String>) -> Self {
        Self {
            listeners: vec![Listener::new(listen)],
            ..Self::default()
        }
    }

    fn validate(&self) -> Result<(), ClusterError> {
        in_range("front", "listeners", self.listeners.len(), 1..=30)?;
        check_all(listed(LISTENERS, &self.listeners))?;
        let drain_delay = self.drain_delay.as_secs_f64();
        in_range("front", "drain_delay", drain_delay, 0.0..=600.0)?;
        self.clients.validate("front.clients")?;
        self.timeouts.validate("front.timeouts")
    }
}

/// How errors name the list.
const LISTENERS: &str = "front.listeners";

impl From<&ClusterConfig> for FrontConfig {
    /// What the file of the bundled proxy says.
    fn from(config: &ClusterConfig) -> Self {
        let listeners = config.listeners().map(|listener| Listener {
            listen: listener.listen.to_owned(),
            tls: listener.tls.cloned(),
        });
        Self {
            listeners: listeners.collect(),
            clients: config.clients.clone(),
            timeouts: config.timeouts,
            drain_delay: Duration::from_millis(config.drain_delay_ms),
            access_log: None,
        }
    }
}

/// What [`add_proxy`] has added to a server.
#[derive(Debug)]
#[non_exhaustive]
pub struct OwnProxy {
    /// What has happened to client connections.
    pub clients: Arc<FrontStatistics>,
    /// The service of the proxy, which may depend on others: see [`ServiceHandle::add_dependency`].
    pub service: ServiceHandle,
}

/// Adds a proxy of your own to a Pingora server, behind the same front as the bundled one: deadlines and limits for
/// clients, PROXY headers, TLS with certificates that are read again when they change, HTTP/2. It listens as the bundled one
/// does: an address that is taken is an error now, or ends the process with status 1 if it is taken when the server runs;
/// SIGTERM and SIGQUIT wait for its requests, and hand its sockets over. Connects to nothing and listens on nothing before
/// the server runs; run it with [`run`](super::run).
///
/// Hooks of your proxy see what they see in a service of Pingora's own, but for the `timing_digest` of a session's digest, which is
/// empty, and its `proxy_digest`, which is the front's. [`Shutdown::end_connection`] in `response_filter` ends the
/// connections of clients that go on asking while the process is to end; idle ones end in any case.
///
/// ```no_run
/// use pingora::proxy::ProxyHttp;
/// use pingora::server::Server;
/// use pingora_etcd::proxy::{self, FrontConfig};
/// use std::process::ExitCode;
///
/// fn serve<P>(proxy: P) -> Result<ExitCode, Box<dyn std::error::Error>>
/// where
///     P: ProxyHttp + Send + Sync + 'static,
///     P::CTX: Send + Sync,
/// {
///     let mut server = Server::new(None)?;
///     let mut front = FrontConfig::new("0.0.0.0:8080");
///     front.clients.connections_per_client = 100;
///     proxy::add_proxy(&mut server, &front, proxy)?;
///     Ok(proxy::run(server)) // until a signal ends it
/// }
/// ```
///
/// # Errors
///
/// When the configuration is invalid, or one of its addresses cannot be listened on.
pub fn add_proxy<P>(
    server: &mut Server,
    front: &FrontConfig,
    proxy: P,
) -> Result<OwnProxy, ClusterError>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    front.validate()?;
    check_listeners(server, listed(LISTENERS, &front.listeners))?;
    let listeners = FrontListener::all(listed(LISTENERS, &front.listeners))?;
    let certificates = Reload::default();
    for tls in listeners.iter().filter_map(|it| it.tls.as_ref()) {
        certificates.add(&tls.files());
    }
    let statistics = Arc::<FrontStatistics>::default();
    let made = made(&server.configuration, front, proxy)?;
    let settings = front_settings(&front.clients, &front.timeouts, listeners);
    let refused = front.access_log.clone().map(tell_refused);
    let made = Front::new(made, settings, statistics.clone(), refused);
    Shutdown::of_process().accepts_for(front.drain_delay);
    server.add_service(background_service("certificates", certificates));
    let addresses = front.listeners.iter().map(|it| it.listen.clone());
    let service = listening(server, made, addresses.collect(), Box::new(Vec::new));
    Ok(OwnProxy {
        clients: statistics,
        service: server.add_service(service),
    })
}

fn made<P: ProxyHttp>(
    server: &Arc<ServerConf>,
    front: &FrontConfig,
    proxy: P,
) -> Result<Counted<P>, ClusterError> {
    let mut proxy = with_system_cas("proxy", || http_proxy(server, proxy))?;
    proxy.downstream_modules.add_module(Box::new(Phases));
    Ok(Counted {
        proxy: Arc::new(proxy),
        server: server_options(&front.clients),
        h2: h2_options(&front.clients, false),
        client_write: Duration::from_millis(front.timeouts.client_write_ms),
    })
}

/// A proxy whose requests the process waits for when it ends. The front knows of those of HTTP/1.
struct Counted<P> {
    proxy: Arc<HttpProxy<P>>,
    server: HttpServerOptions,
    h2: H2Options,
    client_write: Duration,
}

#[async_trait]
impl<P> HttpServerApp for Counted<P>
where
    P: ProxyHttp + Send + Sync + 'static,
    P::CTX: Send + Sync,
{
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let connection = session.digest().and_then(Connection::of_digest).cloned();
        if session.is_http2() {
            let _request = Shutdown::of_process().request();
            let _stream = connection.as_ref().map(Connection::opens);
            // A client that gives no room on its stream blocks nothing of the connection, so the front does not notice.
            session.set_write_timeout(Some(self.client_write));
            return self.proxy.process_new_http(session, shutdown).await;
        }
        // The front keeps the time.
        session.set_read_timeout(None);
        let processing = self.proxy.process_new_http(session, shutdown);
        let reused = follow_phases(connection.clone(), processing).await;
        if let Some(connection) = connection.filter(|_| reused.is_some()) {
            connection.enter(Phase::Idle);
        }
        reused
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.server)
    }

    fn h2_options(&self) -> Option<H2Options> {
        Some(self.h2.clone())
    }

    async fn http_cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use ::pingora::apps::ServerApp;
    use ::pingora::prelude::HttpPeer;
    use ::pingora::proxy::Session;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::watch;

    use super::*;

    const SLOW: Duration = Duration::from_millis(900);

    struct To(SocketAddr);

    #[async_trait]
    impl ProxyHttp for To {
        type CTX = ();

        fn new_ctx(&self) {}

        async fn upstream_peer(
            &self,
            _: &mut Session,
            (): &mut (),
        ) -> ::pingora::Result<Box<HttpPeer>> {
            Ok(Box::new(HttpPeer::new(self.0, false, String::new())))
        }
    }

    /// Reads a message up to its end: its head, and the length of its body.
    async fn read_message(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<(String, usize)> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        stream.read_exact(&mut body).await.ok()?;
        assert!(body.iter().all(|byte| *byte == b'x'), "it is damaged");
        Some((head, body.len()))
    }

    /// Answers slowly, with as many bytes as it has got.
    async fn answer(mut stream: TcpStream) -> Option<()> {
        loop {
            let (_, length) = read_message(&mut stream).await?;
            tokio::time::sleep(SLOW).await;
            let body = "x".repeat(length);
            let response = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
            stream.write_all(response.as_bytes()).await.ok()?;
        }
    }

    async fn client(front: &FrontConfig) -> DuplexStream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = To(listener.local_addr().unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
        let listeners = FrontListener::all(listed(LISTENERS, &front.listeners)).unwrap();
        let settings = front_settings(&front.clients, &front.timeouts, listeners);
        let made = made(&Arc::new(ServerConf::default()), front, to).unwrap();
        let front = Arc::new(Front::new(made, settings, Arc::default(), None));
        let (client, server) = duplex(65_536);
        tokio::spawn(async move {
            let (_running, shutdown) = watch::channel(false);
            front.process_new(Box::new(server), &shutdown).await;
        });
        client
    }

    /// The times and sizes of the head are not those of all that is received after it.
    #[tokio::test]
    async fn each_part_of_a_request_has_its_own_limits() {
        let mut front = FrontConfig::new("127.0.0.1:1");
        front.timeouts.client_header_ms = 300;
        front.timeouts.client_body_ms = 500;
        front.clients.head_bytes = 4_096;
        front.validate().unwrap();
        let mut one = client(&front).await;
        let post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n";
        for _ in 0..3 {
            one.write_all(post).await.unwrap();
            for _ in 0..4 {
                one.write_all(&[b'x'; 25_000]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let (head, length) = read_message(&mut one).await.unwrap();
            assert!(head.starts_with("http/1.1 200"), "{head}");
            assert_eq!(length, 100_000);
            // Idle for longer than a head may take.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        one.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            .await
            .unwrap();
        let (head, _) = read_message(&mut one).await.unwrap();
        assert!(head.starts_with("http/1.1 200"), "{head}");
        one.write_all(b"GET / HT").await.unwrap();
        let mut rest = String::new();
        one.read_to_string(&mut rest).await.unwrap();
        assert!(rest.starts_with("HTTP/1.1 408"), "{rest}");
        // A body that stalls.
        let mut one = client(&front).await;
        one.write_all(post).await.unwrap();
        one.write_all(b"xxx").await.unwrap();
        let start = std::time::Instant::now();
        rest.clear();
        let _ = one.read_to_string(&mut rest).await;
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(450), "{took:?}");
        assert!(!rest.contains(" 200 "), "{rest}");
    }
}
