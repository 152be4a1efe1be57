//! Tests that the background tasks of a store, on which nobody waits, are replaced after a panic. A
//! subscriber causes the panic at a log line that the task writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pingora_etcd::store::{EtcdStore, Selector, Store, WatchRange};
use tracing::subscriber::DefaultGuard;

use super::auth::{Guarded, balancer};
use super::common::etcd::{Etcd, Setup};
use super::common::scripted::{Scripted, created};
use super::common::{eventually, group, subscribe, within};
use super::members::healthy;
use super::{Running, ready};

/// A subscriber that, once armed, panics at the first line that contains `text`.
#[derive(Clone)]
struct PanicAt {
    text: &'static str,
    is_armed: Arc<AtomicU32>,
    /// How many times the line was written, including the one that panicked.
    seen: Arc<AtomicU32>,
}

impl PanicAt {
    /// Installs the subscriber for everything that runs on this thread, until the guard is dropped.
    fn start(text: &'static str) -> (Self, DefaultGuard) {
        let subscriber = Self {
            text,
            is_armed: Arc::default(),
            seen: Arc::default(),
        };
        let guard = subscribe(subscriber.clone());
        (subscriber, guard)
    }

    fn arm(&self) {
        self.is_armed.store(1, Ordering::SeqCst);
    }

    fn has_panicked(&self) -> bool {
        self.seen() > 0 && self.is_armed.load(Ordering::SeqCst) == 0
    }

    fn seen(&self) -> u32 {
        self.seen.load(Ordering::SeqCst)
    }
}

struct Message(String);

impl tracing::field::Visit for Message {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl tracing::Subscriber for PanicAt {
    fn enabled(&self, of: &tracing::Metadata<'_>) -> bool {
        of.target().starts_with("pingora_etcd") && *of.level() <= tracing::Level::DEBUG
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        if message.0.contains(self.text) {
            self.seen.fetch_add(1, Ordering::SeqCst);
            let is_armed = self.is_armed.swap(0, Ordering::SeqCst);
            assert_eq!(is_armed, 0, "injected panic at this line: {}", message.0);
        }
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn a_task_that_connects_is_replaced() {
    let (log, _guard) = PanicAt::start("connected to etcd");
    log.arm();
    let (etcd, group) = (Etcd::shared(), group("panics"));
    let discovery = ready(&etcd.options(), &group).await;
    let node = Running::start(&etcd.options(), &group, "n1").await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    assert!(log.has_panicked() && log.seen() >= 3);
    node.stop().await;
}

#[tokio::test]
async fn a_task_that_renews_a_lease_is_replaced() {
    let (log, _guard) = PanicAt::start("lease granted");
    log.arm();
    let (etcd, group) = (Etcd::shared(), group("panics"));
    let node = Running::start(&etcd.options(), &group, "n1").await;
    assert!(log.has_panicked() && log.seen() == 2);
    node.stop().await;
}

#[tokio::test]
async fn a_task_that_gets_a_token_is_replaced() {
    let (log, _guard) = PanicAt::start("token refreshed");
    let guarded = Guarded::new(&["--auth-token-ttl=1"]).await;
    guarded.user("balancer", balancer()).await;
    let discovery = ready(&guarded.options("balancer"), "any").await;
    log.arm();
    // The discovery's next request comes only with metrics or a silence, so this store makes
    // frequent requests.
    let store = EtcdStore::new(guarded.options("balancer")).unwrap();
    let any = Selector::Key("registry/any".to_owned());
    within(
        "a token is refused, and the task that gets a new one panics",
        async {
            while !log.has_panicked() {
                let _ = store.list(&any, None).await;
                tokio::time::sleep(Duration::from_millis(2_500)).await;
            }
        },
    )
    .await;
    within("a new token", async {
        while store.list(&any, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(log.seen() >= 2 && discovery.is_running());
}

#[tokio::test]
async fn a_task_that_follows_the_members_goes_on() {
    let (log, _guard) = PanicAt::start("the endpoints follow the members");
    log.arm();
    // etcd advertises another URL than the one it is reached at here.
    let etcd = Etcd::with(Setup {
        arguments: vec!["--advertise-client-urls=http://localhost:{port}".to_owned()],
        ..Setup::default()
    });
    let options = etcd.options().sync_endpoints(true);
    let discovery = ready(&options, &group("panics")).await;
    eventually("the line is logged again", || log.seen() == 2).await;
    assert!(log.has_panicked() && discovery.is_running());
}

#[tokio::test]
async fn a_task_that_reads_the_watches_is_replaced_with_its_connection() {
    let (log, _guard) = PanicAt::start("numbers watches by itself");
    log.arm();
    let mut server = Scripted::start(healthy).await;
    let store = EtcdStore::new(server.options()).unwrap();
    let range = || WatchRange {
        keys: Selector::Key("a".to_owned()),
        from: 2,
    };
    let (refused, _first) = tokio::join!(store.watch(vec![range()]), async {
        let mut watches = server.watches().await;
        watches.next_create().await;
        watches.answer(created(0, 1));
        watches
    });
    let error = refused.err().expect("the caller receives an error");
    assert!(error.is_transient(), "{error}");
    assert!(log.has_panicked());
    let opened = within("another connection", async {
        tokio::join!(store.watch(vec![range()]), async {
            let mut watches = server.watches().await;
            watches.next_create().await;
            watches.answer(created(0, 1));
            watches
        })
    })
    .await;
    opened.0.expect("the watch opens on another connection");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn a_task_that_looks_for_new_certificates_goes_on() {
    use super::common::certificates::Directory;
    use super::common::link::Link;
    use super::tls::Secure;
    use pingora_etcd::{EtcdOptions, store::TlsOptions};

    let (log, _guard) = PanicAt::start("connected to etcd");
    let secure = Secure::new(true);
    let files = Directory::new();
    let put = || {
        let pair = secure.ca.client("client");
        files.swap(&[
            ("ca.pem", secure.ca.pem()),
            ("client.pem", &pair.cert),
            ("client.key", &pair.key),
        ]);
    };
    put();
    let tls = TlsOptions::new()
        .ca_file(files.file("ca.pem"))
        .identity(files.file("client.pem"), files.file("client.key"));
    let link = Link::to(secure.etcd.address()).await;
    let options = EtcdOptions::new([format!("https://{}", link.address())]).tls(tls);
    let discovery = ready(&options, &group("panics")).await;
    assert_eq!((log.seen(), link.connections()), (1, 1));
    log.arm();
    put();
    eventually("a new connection is made", || {
        log.has_panicked() && log.seen() >= 3 && link.open() == 1
    })
    .await;
    within("the discovery is live", discovery.wait_ready()).await;
}
