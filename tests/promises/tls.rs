//! Tests of TLS, to clients and to backends, on the release programs.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use super::common::certificates::{Authority, Directory, Pair};
use super::common::etcd::Etcd;
use super::common::{DEADLINE, group, local};
use super::echo::{EchoClient, EchoServer};
use super::raw::{Raw, RawBackend, ok, register, status};
use super::world::{Balancer, Setup, entry, put, until};

const SECOND: Duration = Duration::from_secs(1);

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authority: &Authority) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.pem().as_bytes());
    roots.add(ca.unwrap()).unwrap();
    roots
}

fn parsed(pair: &Pair) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
    (vec![cert], key)
}

/// Connects with TLS, asking for this name.
pub(super) async fn connect(
    address: &str,
    name: &str,
    authority: &Authority,
    shows: Option<&Pair>,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    handshake(stream, name, authority, shows, protocols).await
}

async fn handshake(
    stream: TcpStream,
    name: &str,
    authority: &Authority,
    shows: Option<&Pair>,
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(authority));
    let mut config = match shows.map(parsed) {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
        None => config.with_no_client_auth(),
    };
    let protocols = protocols.iter().map(|name| name.as_bytes().to_vec());
    config.alpn_protocols = protocols.collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await
}

/// Sends a request and reads up to the end of the connection.
pub(super) async fn get(stream: &mut TlsStream<TcpStream>) -> String {
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    // A server that refuses a client's certificate ends the connection at any time.
    let _ = stream.write_all(request).await;
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// A balancer with these fields in front of a backend at this port. It listens when it has a view.
pub(super) async fn before(port: u16, name: &str, fields: &str) -> Balancer {
    let (etcd, group) = (Etcd::shared(), group(name));
    let entry = entry("a", Some(port), json!({}));
    put(&mut etcd.raw_client().await, &group, &entry, None).await;
    Setup::shared(&group).with(fields).listening().await
}

pub(super) fn certificates(files: &[(&Path, &Path)]) -> String {
    let pairs: Vec<_> = files
        .iter()
        .map(|(cert, key)| {
            format!(
                "{{ cert_file: {}, key_file: {} }}",
                cert.display(),
                key.display()
            )
        })
        .collect();
    format!("[{}]", pairs.join(", "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_chosen_by_name_and_reloaded_but_bad_ones_are_not() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let one = files.write_pair("one", &authority.server(&["one.test"]));
    let two = files.write_pair("two", &authority.server(&["two.test", "*.wild.test"]));
    let listed = certificates(&[(&one.0, &one.1), (&two.0, &two.1)]);
    let fields = format!("tls: {{ certificates: {listed} }}");
    let balancer = before(backend.address.port(), "tls", &fields).await;
    let address = &balancer.listen;
    for name in ["one.test", "two.test", "a.wild.test"] {
        let mut client = connect(address, name, &authority, None, &[]).await.unwrap();
        assert_eq!(status(&get(&mut client).await), "200", "{name}");
        assert!(
            backend.last().contains("x-forwarded-proto: https"),
            "{}",
            backend.last()
        );
    }
    // The first one for any other name, which this client does not accept.
    let error = connect(address, "other.test", &authority, None, &[])
        .await
        .unwrap_err();
    assert!(error.to_string().contains("one.test"), "{error}");
    // HTTP/2 is offered.
    let client = connect(address, "one.test", &authority, None, &["h2", "http/1.1"]).await;
    assert_eq!(
        client.unwrap().get_ref().1.alpn_protocol(),
        Some(&b"h2"[..])
    );
    // Without TLS nobody is answered.
    let mut plain = Raw::to(&balancer).await;
    plain.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(!plain.rest().await.contains("HTTP/"));

    // A key that does not fit: the former pair is still in use.
    let new = authority.server(&["new.test"]);
    std::fs::write(&one.1, &new.key).unwrap();
    until("it is refused", async || {
        balancer
            .log_text()
            .contains("is not the key of the certificate")
    })
    .await;
    connect(address, "one.test", &authority, None, &[])
        .await
        .unwrap();
    // One that has ended already.
    let over = authority.expired_server(&["one.test"]);
    std::fs::write(&one.0, &over.cert).unwrap();
    std::fs::write(&one.1, &over.key).unwrap();
    until("it is refused", async || {
        let text = balancer.log_text();
        text.contains("changed certificate files have ended already")
    })
    .await;
    connect(address, "one.test", &authority, None, &[])
        .await
        .unwrap();
    std::fs::write(&one.0, &new.cert).unwrap();
    std::fs::write(&one.1, &new.key).unwrap();
    until("the new one is in use", async || {
        connect(address, "new.test", &authority, None, &[])
            .await
            .is_ok()
    })
    .await;
    connect(address, "two.test", &authority, None, &[])
        .await
        .unwrap();

    // A file that cannot be read holds up no other one, and is said once.
    std::fs::remove_file(&two.0).unwrap();
    let cannot_be_read = || {
        let text = balancer.log_text();
        text.matches("a certificate file cannot be read").count()
    };
    until("it is missed", async || cannot_be_read() == 1).await;
    let renewed = authority.server(&["renewed.test"]);
    std::fs::write(&one.0, &renewed.cert).unwrap();
    std::fs::write(&one.1, &renewed.key).unwrap();
    for name in ["renewed.test", "two.test"] {
        until("the files are in use", async || {
            connect(address, name, &authority, None, &[]).await.is_ok()
        })
        .await;
    }
    // After one more look at all of them.
    let again = authority.server(&["again.test"]);
    std::fs::write(&one.0, &again.cert).unwrap();
    std::fs::write(&one.1, &again.key).unwrap();
    until("the files are in use", async || {
        connect(address, "again.test", &authority, None, &[])
            .await
            .is_ok()
    })
    .await;
    assert_eq!(cannot_be_read(), 1);
}

/// A client that knows this kind of signatures only, and believes every certificate.
#[derive(Debug)]
struct KnowsOnly(SignatureScheme, Mutex<Vec<u8>>);

impl ServerCertVerifier for KnowsOnly {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.1.lock().unwrap() = shown.to_vec();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![self.0]
    }
}

/// As RSA for old devices beside ECDSA for all others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_certificates_for_a_name_the_client_gets_one_that_it_can_verify() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let usual = authority.server(&["one.test"]);
    let other = authority.ed25519_server(&["one.test"]);
    let in_files = [
        files.write_pair("usual", &usual),
        files.write_pair("other", &other),
    ];
    let listed = certificates(&in_files.each_ref().map(|(cert, key)| (&**cert, &**key)));
    let fields = format!("tls: {{ certificates: {listed} }}");
    let balancer = before(backend.address.port(), "tls-kinds", &fields).await;
    for name in ["one.test", "elsewhere.test"] {
        for (scheme, pair) in [
            (SignatureScheme::ECDSA_NISTP256_SHA256, &usual),
            (SignatureScheme::ED25519, &other),
        ] {
            let verifier = Arc::new(KnowsOnly(scheme, Mutex::default()));
            let config = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(verifier.clone())
                .with_no_client_auth();
            let stream = TcpStream::connect(&balancer.listen).await.unwrap();
            let server = ServerName::try_from(name).unwrap();
            let connector = TlsConnector::from(Arc::new(config));
            let mut client = connector.connect(server, stream).await.unwrap();
            assert_eq!(status(&get(&mut client).await), "200");
            assert_eq!(*verifier.1.lock().unwrap(), parsed(pair).0[0].to_vec());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_show_certificates_and_backends_get_them() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let (known, strangers) = (Authority::new("clients"), Authority::new("strangers"));
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let ca = files.write("clients.pem", known.pem());
    let listed = certificates(&[(&pair.0, &pair.1)]);
    let (client, stranger) = (known.client("c"), strangers.client("s"));
    for (mode, without) in [("required", false), ("optional", true)] {
        let fields = format!(
            "tls: {{ certificates: {listed}, client_certificate: {mode}, client_ca_file: {} }}",
            ca.display()
        );
        let balancer = before(backend.address.port(), "mtls", &fields).await;
        let served = async |shows: Option<&Pair>| {
            let stream = connect(&balancer.listen, "one.test", &authority, shows, &[]).await;
            match stream {
                Ok(mut stream) => status(&get(&mut stream).await) == "200",
                Err(_) => false,
            }
        };
        assert!(served(Some(&client)).await, "{mode}");
        assert!(
            backend.last().contains("client-cert: :mii"),
            "{}",
            backend.last()
        );
        assert!(!served(Some(&stranger)).await, "{mode}");
        assert_eq!(served(None).await, without, "{mode}");
        if without {
            assert!(
                !backend.last().contains("client-cert"),
                "{}",
                backend.last()
            );
            // One that the client has written itself does not reach backends.
            let mut stream = connect(&balancer.listen, "one.test", &authority, None, &[])
                .await
                .unwrap();
            let request = b"GET / HTTP/1.1\r\nHost: a\r\nClient-Cert: :AA==:\r\nclient_cert: x\r\nConnection: close\r\n\r\n";
            stream.write_all(request).await.unwrap();
            assert_eq!(status(&get(&mut stream).await), "200");
            for request in backend.requests() {
                // Many servers cannot tell a name with an underscore from one with a hyphen.
                let is_forged = request.contains("AA==")
                    || request.to_ascii_lowercase().contains("client_cert");
                assert!(!is_forged, "{request}");
            }
        }
    }
    // A route by the certificate is for those who have shown one, whatever others write.
    let fields = format!(
        "tls: {{ certificates: {listed}, client_certificate: optional, client_ca_file: {} }}\n\
         routes:\n- {{ headers: {{ client-cert: '*' }}, answer: {{ status: 202 }} }}",
        ca.display()
    );
    let balancer = before(backend.address.port(), "mtls-route", &fields).await;
    let asks = async |shows: Option<&Pair>| {
        let stream = connect(&balancer.listen, "one.test", &authority, shows, &[]).await;
        let mut stream = stream.unwrap();
        let request =
            b"GET / HTTP/1.1\r\nHost: a\r\nClient-Cert: :AA==:\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        status(&get(&mut stream).await).to_owned()
    };
    assert_eq!(asks(Some(&client)).await, "202");
    assert_eq!(asks(None).await, "200");
    // The CA of clients is replaced in a running process.
    let changing = files.write("changing.pem", strangers.pem());
    let fields = format!(
        "tls: {{ certificates: {listed}, client_certificate: required, client_ca_file: {} }}",
        changing.display()
    );
    let balancer = before(backend.address.port(), "mtls-ca", &fields).await;
    let is_served = async |shows: &Pair| {
        let stream = connect(&balancer.listen, "one.test", &authority, Some(shows), &[]).await;
        match stream {
            Ok(mut stream) => status(&get(&mut stream).await) == "200",
            Err(_) => false,
        }
    };
    assert!(is_served(&stranger).await && !is_served(&client).await);
    std::fs::write(&changing, known.pem()).unwrap();
    until("the new CA is in use", async || is_served(&client).await).await;
    assert!(!is_served(&stranger).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_header_comes_before_tls_and_a_handshake_has_its_time() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let listed = certificates(&[(&pair.0, &pair.1)]);
    let fields = format!(
        "tls: {{ certificates: {listed} }}\nclients: {{ proxy_protocol: [127.0.0.0/8] }}\n\
         timeouts: {{ client_header_ms: 3000 }}"
    );
    let balancer = before(backend.address.port(), "tls-proxy", &fields).await;
    let mut stream = TcpStream::connect(&balancer.listen).await.unwrap();
    let header = b"PROXY TCP4 192.0.2.7 192.0.2.8 5000 443\r\n";
    stream.write_all(header).await.unwrap();
    let mut stream = handshake(stream, "one.test", &authority, None, &[])
        .await
        .unwrap();
    assert_eq!(status(&get(&mut stream).await), "200");
    let last = backend.last();
    assert!(last.contains("x-forwarded-for: 192.0.2.7"), "{last}");
    assert!(last.contains("x-forwarded-port: 443"), "{last}");
    // A client that does not go on with the handshake.
    let start = Instant::now();
    let mut stream = TcpStream::connect(&balancer.listen).await.unwrap();
    stream.write_all(header).await.unwrap();
    stream.write_all(b"\x16\x03\x01").await.unwrap();
    assert_eq!(Raw(stream).rest().await, "");
    assert!(start.elapsed() > SECOND * 5 / 2 && start.elapsed() < 10 * SECOND);
}

/// TLS in front of a backend that speaks without it.
pub(super) struct OverTls {
    pub(super) port: u16,
    /// What the section `backends` says of it.
    pub(super) fields: String,
    _files: Directory,
    _serving: JoinSet<()>,
}

impl OverTls {
    pub(super) async fn to(backend: u16) -> Self {
        let (files, authority) = (Directory::new(), Authority::new("backends"));
        let ca = files.write("ca.pem", authority.pem());
        let pair = authority.server(&["b.test"]);
        let serve = move |mut stream: Accepted| -> Served {
            Box::pin(async move {
                let mut to = TcpStream::connect((local(), backend)).await.unwrap();
                // Either end may break off.
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut to).await;
            })
        };
        let (port, serving) = serve_over_tls(&pair, None, serve).await;
        Self {
            port,
            fields: format!("server_name: b.test, ca_file: {}", ca.display()),
            _files: files,
            _serving: serving,
        }
    }
}

type Accepted = tokio_rustls::server::TlsStream<TcpStream>;
type Served = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Serves connections over TLS, of clients that show a certificate if an authority for them is given: at which port.
async fn serve_over_tls(
    pair: &Pair,
    clients: Option<&Authority>,
    serve: impl Fn(Accepted) -> Served + Clone + Send + 'static,
) -> (u16, JoinSet<()>) {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        Some(authority) => {
            let roots = Arc::new(roots(authority));
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = parsed(pair);
    let config = builder.with_single_cert(chain, key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut serving = JoinSet::new();
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, serve) = (acceptor.clone(), serve.clone());
            connections.spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream).await;
                }
            });
        }
    });
    (port, serving)
}

/// A backend that speaks HTTP/1.1 over TLS and answers with the name of the client's certificate's
/// existence.
async fn tls_backend(pair: &Pair, clients: Option<&Authority>) -> (u16, JoinSet<()>) {
    let (port, serving, _) = tls_backend_that_tells(pair, clients).await;
    (port, serving)
}

/// The same, and the requests that it has got.
async fn tls_backend_that_tells(
    pair: &Pair,
    clients: Option<&Authority>,
) -> (u16, JoinSet<()>, Arc<Mutex<Vec<String>>>) {
    let requests = Arc::<Mutex<Vec<String>>>::default();
    let told = requests.clone();
    let serve = move |mut stream: Accepted| -> Served {
        let told = told.clone();
        Box::pin(async move {
            let mut request = [0; 4_096];
            while let Ok(length @ 1..) = stream.read(&mut request).await {
                let text = String::from_utf8_lossy(&request[..length]).into_owned();
                told.lock().unwrap().push(text);
                let _ = stream.write_all(&ok("")).await;
            }
        })
    };
    let (port, serving) = serve_over_tls(pair, clients, serve).await;
    (port, serving, requests)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_gets_its_copies_over_tls_and_none_if_its_certificate_is_for_another_name() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("mirror"));
    let ca = files.write("ca.pem", authority.pem());
    let right = tls_backend_that_tells(&authority.server(&["m.test"]), None).await;
    let wrong = tls_backend_that_tells(&authority.server(&["other.test"]), None).await;
    let (etcd, group) = (Etcd::shared(), group("tls-mirror"));
    let mut keys = etcd.raw_client().await;
    let mut fields = "groups:\n".to_owned();
    for (name, port) in [("right", right.0), ("wrong", wrong.0)] {
        let node = entry(name, Some(port), json!({}));
        put(&mut keys, &format!("{group}-{name}"), &node, None).await;
        let backends = format!(
            "protocol: https, server_name: m.test, ca_file: {}",
            ca.display()
        );
        fields += &format!("  {name}: {{ group: {group}-{name}, backends: {{ {backends} }} }}\n");
    }
    fields += "routes:\n\
               - { path: /wrong, group: default, mirror: { group: wrong } }\n\
               - { path: /right, group: default, mirror: { group: right } }\n";
    register(&etcd, &group, &[&backend]).await;
    let balancer = Setup::shared(&group).with(&fields).listening().await;
    let mut client = Raw::to(&balancer).await;
    for path in ["/wrong", "/right"] {
        client
            .send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .await;
        assert_eq!(status(&client.response().await), "200");
    }
    let copied = |requests: &Mutex<Vec<String>>| requests.lock().unwrap().clone();
    until("the copy is there", async || copied(&right.2).len() == 1).await;
    assert!(copied(&right.2)[0].starts_with("GET /right HTTP/1.1"));
    assert_eq!(copied(&wrong.2), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backends_are_verified_by_name() {
    let (files, authority) = (Directory::new(), Authority::new("backends"));
    let (others, clients) = (Authority::new("others"), Authority::new("clients"));
    let ca = files.write("ca.pem", authority.pem());
    let other_ca = files.write("others.pem", others.pem());
    let (cert, key) = files.write_pair("client", &clients.client("proxy"));
    let (port, _serving) = tls_backend(&authority.server(&["b.test"]), None).await;
    let (careful, _also) = tls_backend(&authority.server(&["b.test"]), Some(&clients)).await;
    let field = |name: &str, ca: &Path| {
        format!(
            "protocol: https, server_name: {name}, ca_file: {}",
            ca.display()
        )
    };
    let shows = format!("cert_file: {}, key_file: {}", cert.display(), key.display());
    for (port, fields, is_served) in [
        (port, field("b.test", &ca), true),
        (port, field("c.test", &ca), false),
        (port, field("b.test", &other_ca), false),
        // Nobody has signed it that the system knows.
        (
            port,
            "protocol: https, server_name: b.test".to_owned(),
            false,
        ),
        (careful, field("b.test", &ca), false),
        (careful, format!("{}, {shows}", field("b.test", &ca)), true),
    ] {
        let section = format!("backends: {{ {fields} }}");
        let balancer = before(port, "https", &section).await;
        let served = balancer.get().await;
        assert_eq!(served == "a", is_served, "{fields}: {served}");
    }
    // The CA is replaced in a running process.
    let changing = files.write("changing.pem", others.pem());
    let section = format!("backends: {{ {} }}", field("b.test", &changing));
    let balancer = before(port, "https-ca", &section).await;
    assert_ne!(balancer.get().await, "a");
    std::fs::write(&changing, authority.pem()).unwrap();
    until("the new CA is in use", async || balancer.get().await == "a").await;
    // So is the certificate that backends are shown.
    let (cert, key) = files.write_pair("shown", &others.client("proxy"));
    let shows = format!("cert_file: {}, key_file: {}", cert.display(), key.display());
    let section = format!("backends: {{ {}, {shows} }}", field("b.test", &ca));
    let balancer = before(careful, "https-shown", &section).await;
    assert_ne!(balancer.get().await, "a");
    files.write_pair("shown", &clients.client("proxy"));
    until("the new certificate is shown", async || {
        balancer.get().await == "a"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_does_not_go_on_with_a_handshake_is_left() {
    let listener = TcpListener::bind((local(), 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for (milliseconds, least, most) in [
        (300, SECOND / 4, 2 * SECOND),
        (2_500, 2 * SECOND, 9 * SECOND),
    ] {
        let fields = format!(
            "backends: {{ protocol: https, server_name: b.test }}\nretries: 0\n\
             timeouts: {{ connect_ms: 300, handshake_ms: {milliseconds} }}"
        );
        let balancer = before(port, "handshake", &fields).await;
        let start = Instant::now();
        assert_eq!(balancer.get().await, "504");
        let took = start.elapsed();
        assert!(took > least && took < most, "{milliseconds}: {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_says_how_it_is_spoken_to_but_cannot_switch_tls_off() {
    let (files, authority) = (Directory::new(), Authority::new("backends"));
    let ca = files.write("ca.pem", authority.pem());
    let (port, _serving) = tls_backend(&authority.server(&["n.test"]), None).await;
    let plain = RawBackend::start(ok).await;
    let etcd = Etcd::shared();
    let mut keys = etcd.raw_client().await;
    let ca = format!("protocol_of_node: true, ca_file: {}", ca.display());
    let tls = format!("{ca}, protocol: https, server_name: n.test");
    for (port, metadata, fields, is_served) in [
        (
            port,
            json!({ "protocol": "https", "server_name": "n.test" }),
            &ca,
            true,
        ),
        (
            port,
            json!({ "protocol": "https", "server_name": "x.test" }),
            &ca,
            false,
        ),
        (
            port,
            json!({ "protocol": "https", "server_name": "" }),
            &ca,
            false,
        ),
        (port, json!({ "protocol": "https" }), &ca, false),
        (
            plain.address.port(),
            json!({ "protocol": "grpc" }),
            &ca,
            true,
        ),
        (
            plain.address.port(),
            json!({ "protocol": "http1" }),
            &tls,
            false,
        ),
        (port, json!({}), &tls, true),
    ] {
        let group = group("node-tls");
        let entry = entry("a", Some(port), json!({ "metadata": metadata }));
        put(&mut keys, &group, &entry, None).await;
        let setup = Setup::shared(&group).with(&format!("backends: {{ {fields} }}"));
        let balancer = setup.serving().await;
        let served = balancer.get().await;
        assert_eq!(served == "a", is_served, "{metadata} {fields}: {served}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_over_tls_at_both_ends() {
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let ca = files.write("ca.pem", authority.pem());
    let backend = authority.server(&["b.test"]);
    let identity = Identity::from_pem(&backend.cert, &backend.key);
    let server = EchoServer::start_tls("s", identity).await;
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let fields = format!(
        "tls: {{ certificates: {} }}\n\
         backends: {{ protocol: h2, server_name: b.test, ca_file: {} }}",
        certificates(&[(&pair.0, &pair.1)]),
        ca.display()
    );
    let balancer = before(server.address.port(), "grpcs", &fields).await;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(authority.pem()))
        .domain_name("one.test");
    let url = format!("https://{}", balancer.listen);
    let endpoint = Channel::from_shared(url).unwrap().tls_config(tls).unwrap();
    let mut client = EchoClient::new(endpoint.connect().await.unwrap());
    for _ in 0..10 {
        assert_eq!(client.call("one").await.unwrap(), "s: one");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_cannot_be_used_at_the_start_are_named() {
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let pair = files.write_pair("one", &authority.server(&["one.test"]));
    let other = files.write_pair("two", &authority.server(&["two.test"]));
    let empty = files.write("empty.pem", "");
    let tls = |cert: &Path, key: &Path| {
        format!("tls: {{ certificates: {} }}", certificates(&[(cert, key)]))
    };
    for (fields, reason) in [
        (
            tls(Path::new("/nowhere"), &pair.1),
            "cluster.tls.certificates[0].cert_file",
        ),
        (tls(&pair.0, &other.1), "is not the key of the certificate"),
        (tls(&pair.0, &empty), "cluster.tls.certificates[0].key_file"),
        (tls(&empty, &pair.1), "has no PEM certificate"),
        (
            "tls: { certificates: [] }".to_owned(),
            "cluster.tls.certificates",
        ),
        (
            "backends: { protocol: https }".to_owned(),
            "cluster.backends.server_name",
        ),
        (
            "backends: { protocol: https, server_name: '' }".to_owned(),
            "cluster.backends.server_name",
        ),
        (
            "backends: { server_name: b.test }".to_owned(),
            "has no effect without TLS",
        ),
        ("backends: { protocol: http3 }".to_owned(), "http3"),
    ] {
        let setup = Setup::shared(&group("bad-tls")).with(&fields);
        let mut balancer = setup.start();
        assert_eq!(balancer.program.ended().await.0.code(), Some(1), "{fields}");
        let text = balancer.log_text();
        assert!(
            text.contains(reason) && !text.contains("panicked"),
            "{fields}: {text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_has_agreed_on_http_2_has_to_begin_with_it_in_time() {
    let backend = RawBackend::start(ok).await;
    let (files, authority) = (Directory::new(), Authority::new("ca"));
    let one = files.write_pair("one", &authority.server(&["one.test"]));
    let listed = certificates(&[(&one.0, &one.1)]);
    let within = async |milliseconds: u32| {
        let fields = format!(
            "timeouts: {{ client_header_ms: {milliseconds} }}\ntls: {{ certificates: {listed} }}"
        );
        before(backend.address.port(), "preface", &fields).await
    };
    let balancer = within(2_500).await;
    for start in [&b""[..], b"PRI * HT"] {
        let begun = Instant::now();
        let client = connect(&balancer.listen, "one.test", &authority, None, &["h2"]).await;
        let mut client = client.unwrap();
        client.write_all(start).await.unwrap();
        client.flush().await.unwrap();
        let mut received = Vec::new();
        let reading = client.read_to_end(&mut received);
        let ended = tokio::time::timeout(10 * SECOND, reading).await;
        assert!(ended.is_ok(), "{start:?}");
        assert!(begun.elapsed() > SECOND * 3 / 2, "{:?}", begun.elapsed());
    }
    // Something else ends at once, however long the time is.
    let patient = within(30_000).await;
    let client = connect(&patient.listen, "one.test", &authority, None, &["h2"]).await;
    let mut client = client.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    client.flush().await.unwrap();
    let mut received = Vec::new();
    let reading = client.read_to_end(&mut received);
    let ended = tokio::time::timeout(10 * SECOND, reading).await;
    assert!(ended.is_ok() && received.is_empty(), "{received:?}");
    for balancer in [&balancer, &patient] {
        let log = balancer.log_text();
        assert!(!log.contains("ERROR"), "{log}");
    }
}
