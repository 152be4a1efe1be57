//! Tests etcd members that cannot be used or are replaced, proxies that assign watch ids
//! themselves, and the order in which a server sends its messages.

use std::process::Command;
use std::time::{Duration, Instant};

use etcd_client::{Client, MemberAddOptions};
use pingora_etcd::store::{EtcdStore, Selector, Store, WatchEvent, WatchRange};
use pingora_etcd::{EtcdOptions, ServiceDiscovery, discovery::DiscoveryStatus};

use super::common::etcd::{Etcd, Process, binary};
use super::common::scripted::{
    Answer, Message, Scripted, WatchRequest, created, header, progress, put, status,
};
use super::common::stalls::Stalls;
use super::common::{eventually, free_port, group, local, skipped, throughout, within};
use super::{Running, builder, put_node, ready};

/// gRPC status codes.
const UNAVAILABLE: u8 = 14;
const FAILED_PRECONDITION: u8 = 9;
const UNIMPLEMENTED: u8 = 12;

fn range(key: &str, from: i64) -> WatchRange {
    WatchRange {
        keys: Selector::Key(key.to_owned()),
        from,
    }
}

/// Responds like a healthy member, as far as it is scripted.
pub(super) fn healthy(call: &str) -> Answer {
    match call {
        "Status" => Answer::Message(status("3.5.30", false)),
        "Range" => Answer::Message(Message::new().message(1, &header(1))),
        _ => Answer::Refused(UNIMPLEMENTED, "not scripted"),
    }
}

#[tokio::test]
async fn a_learner_is_left_for_the_next_endpoint() {
    let etcd = Etcd::shared();
    for code in [FAILED_PRECONDITION, UNAVAILABLE] {
        for reports_learner in [true, false] {
            let group = group("learner");
            let learner = Scripted::start(move |call| match call {
                "Status" => Answer::Message(status("3.6.0", reports_learner)),
                _ => Answer::Refused(code, "etcdserver: rpc not supported for learner"),
            })
            .await;
            let options = EtcdOptions::new([learner.endpoint(), etcd.endpoints()[0].clone()])
                .shuffle_endpoints(false);
            let start = Instant::now();
            let node = Running::start(&options, &group, "n1").await;
            let discovery = ready(&options, &group).await;
            within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
            println!(
                "{code}, reports learner {reports_learner}: {:?}, {:?}",
                start.elapsed(),
                learner.calls()
            );
            let after = start.elapsed();
            assert!(after < Duration::from_secs(5), "{after:?}");
            assert_eq!(
                discovery.store_status().endpoint.as_ref(),
                Some(&etcd.endpoints()[0])
            );
            if reports_learner {
                assert!(learner.calls().iter().all(|call| call == "Status"));
            }
            node.stop().await;
        }
    }
}

#[tokio::test]
async fn an_answer_about_progress_is_not_for_watches_confirmed_after_it_was_asked_for() {
    let mut server = Scripted::start(healthy).await;
    let options = server.options().silence_timeout(Duration::from_secs(4));
    let store = EtcdStore::new(options).unwrap();
    let (opened, mut watches) = tokio::join!(store.watch(vec![range("a", 2)]), async {
        let mut watches = server.watches().await;
        let id = watches.next_create().await;
        watches.answer(created(id, 1));
        watches
    });
    let mut first = opened.unwrap();
    let of_first = tokio::spawn(async move {
        let events = first.next().await.unwrap();
        (events, first)
    });
    // The watch is quiet, so the store requests its progress. Another watch is opened before the
    // server responds.
    while watches.next().await != WatchRequest::Progress {}
    let (opened, id) = tokio::join!(store.watch(vec![range("b", 2)]), async {
        let id = watches.next_create().await;
        watches.answer(created(id, 1));
        id
    });
    let mut second = opened.unwrap();
    watches.answer(progress(50));
    // A change before that revision, which the second watch had not received when progress was
    // requested.
    watches.answer(put(id, "b", 40));
    let events = within("the change of the second watch", second.next())
        .await
        .unwrap();
    assert!(matches!(&events[..], [WatchEvent::Put(entry)] if entry.mod_revision == 40));
    assert_eq!(second.position()[0].from, 41);
    // The next progress request was made after both watches were confirmed, so its response is
    // valid for both.
    while watches.next().await != WatchRequest::Progress {}
    watches.answer(progress(60));
    watches.answer(put(id, "b", 61));
    within("the next change of the second watch", second.next())
        .await
        .unwrap();
    assert_eq!(second.position()[0].from, 62);
    of_first.abort();
}

#[tokio::test]
async fn a_silent_watch_is_replaced_and_tells_each_change_once() {
    let mut server = Scripted::start(healthy).await;
    let options = server.options().silence_timeout(Duration::from_secs(3));
    let store = EtcdStore::new(options).unwrap();
    let (opened, (mut watches, old)) = tokio::join!(store.watch(vec![range("a", 2)]), async {
        let mut watches = server.watches().await;
        let id = watches.next_create().await;
        watches.answer(created(id, 1));
        (watches, id)
    });
    let mut watcher = opened.unwrap();
    watches.answer(put(old, "a", 5));
    assert_eq!(
        within("a change arrives", watcher.next())
            .await
            .unwrap()
            .len(),
        1
    );
    let delivered = tokio::spawn(async move {
        let mut delivered = Vec::new();
        while delivered.len() < 2 {
            let events = watcher.next().await.unwrap();
            delivered.extend(events.iter().map(WatchEvent::revision));
        }
        delivered
    });
    // The server does not respond to the progress request, so a new watch replaces this one from
    // its position on.
    let new = loop {
        match watches.next().await {
            WatchRequest::Create { from, id, .. } => {
                assert_eq!(from, 6);
                break id as i64;
            }
            request => assert_eq!(request, WatchRequest::Progress),
        }
    };
    // Both watches deliver the same change; the old one delivers it once more afterwards.
    watches.answer(put(old, "a", 6));
    watches.answer(created(new, 6));
    watches.answer(put(new, "a", 6));
    watches.answer(put(old, "a", 6));
    watches.answer(put(new, "a", 7));
    while watches.next().await != WatchRequest::Cancel(old as u64) {}
    assert_eq!(within("both changes", delivered).await.unwrap(), [6, 7]);
}

/// Since 3.6.2 and 3.5.22 a server does not report progress while a watch starts at a future
/// revision, which is the case while nothing is written. It has reported progress before, so its
/// silence does not mean that it is dead.
#[tokio::test]
async fn a_server_that_does_not_say_any_more_how_far_it_is_is_not_left() {
    let mut server = Scripted::start(healthy).await;
    let silence_limit = Duration::from_secs(3);
    let options = server.options().silence_timeout(silence_limit);
    let store = EtcdStore::new(options).unwrap();
    let (opened, (mut watches, old)) = tokio::join!(store.watch(vec![range("a", 2)]), async {
        let mut watches = server.watches().await;
        let id = watches.next_create().await;
        watches.answer(created(id, 1));
        (watches, id)
    });
    let mut watcher = opened.unwrap();
    watches.answer(put(old, "a", 5));
    assert_eq!(
        within("a change arrives", watcher.next())
            .await
            .unwrap()
            .len(),
        1
    );
    let (delivered, mut events) = tokio::sync::mpsc::unbounded_channel();
    let reading = tokio::spawn(async move {
        loop {
            let next = watcher.next().await;
            let ended = next.is_err();
            if delivered.send((next, Instant::now())).is_err() || ended {
                return;
            }
        }
    });
    while watches.next().await != WatchRequest::Progress {}
    watches.answer(progress(5));
    // From here on the server reports no progress, for more than twice the allowed silence.
    let (mut id, start) = (old, Instant::now());
    for _ in 0..4 {
        while watches.next().await != WatchRequest::Progress {}
        id = watches.next_create().await;
        watches.answer(created(id, 5));
    }
    assert!(start.elapsed() > silence_limit * 2);
    watches.answer(put(id, "a", 6));
    let (next, _) = within("a change arrives", events.recv()).await.unwrap();
    assert_eq!(next.unwrap().len(), 1);
    let dials = || {
        server
            .calls()
            .iter()
            .filter(|call| *call == "Status")
            .count()
    };
    assert_eq!(dials(), 1, "the store must keep its first connection");

    // A progress response at last: it is unknown which request it belongs to and how long it took.
    // From here on, silence must be noticed as quickly as before.
    while watches.next().await != WatchRequest::Progress {}
    watches.answer(progress(6));
    let silent = Instant::now();
    let (next, at) = within("the silence is noticed", events.recv())
        .await
        .unwrap();
    assert!(next.is_err());
    let took = at - silent;
    assert!(took < silence_limit * 3, "{took:?}");
    reading.abort();
}

#[tokio::test]
async fn a_server_that_numbers_watches_by_itself_is_asked_for_one_at_a_time() {
    let mut server = Scripted::start(healthy).await;
    let store = EtcdStore::new(server.options()).unwrap();
    let ranges = vec![range("a", 2), range("b", 2), range("c", 2)];
    let (opened, mut watches) = tokio::join!(store.watch(ranges), async {
        let mut watches = server.watches().await;
        for number in [7, 3, 5] {
            watches.next_create().await;
            // The store creates no other watch before this one is confirmed.
            throughout(
                "no further request before the confirmation",
                Duration::from_millis(50),
                || watches.try_next().is_none(),
            )
            .await;
            watches.answer(created(number, 1));
        }
        watches
    });
    let mut watcher = opened.unwrap();
    for (number, key, revision) in [(3, "b", 2), (5, "c", 3), (7, "a", 4)] {
        watches.answer(put(number, key, revision));
        let events = within("a change arrives", watcher.next()).await.unwrap();
        assert!(
            matches!(&events[..], [WatchEvent::Put(entry)] if entry.key == key),
            "{events:?}"
        );
    }
    let from: Vec<_> = watcher.position().iter().map(|range| range.from).collect();
    assert_eq!(from, [5, 3, 4]);
    drop(watcher);
    let mut cancelled = Vec::new();
    while cancelled.len() < 3 {
        if let WatchRequest::Cancel(number) = watches.next().await {
            cancelled.push(number);
        }
    }
    cancelled.sort_unstable();
    assert_eq!(cancelled, [3, 5, 7]);
}

/// Checks how long changes took until they were seen. A machine that stands still may delay any of them.
fn are_seen_soon(mut took: Vec<Duration>, stalls: &Stalls) {
    took.sort_unstable();
    let (median, slowest) = (took[took.len() / 2], took[took.len() - 1]);
    println!(
        "of {} changes, the median {median:?} and the slowest {slowest:?}",
        took.len()
    );
    let stalled = stalls.so_far();
    assert!(median < Duration::from_millis(200) + stalled, "{took:?}");
    assert!(slowest < Duration::from_secs(1) + stalled, "{took:?}");
}

struct Proxy {
    port: u16,
    target: String,
    process: Option<Process>,
}

impl Proxy {
    fn start(&mut self) {
        let address = format!("{}:{}", local(), self.port);
        let mut command = Command::new(binary().unwrap());
        command.args([
            "grpc-proxy",
            "start",
            &format!("--endpoints={}", self.target),
            &format!("--listen-addr={address}"),
            &format!("--advertise-client-url={address}"),
        ]);
        let files = format!("{}/proxy-{}", env!("CARGO_TARGET_TMPDIR"), self.port);
        std::fs::create_dir_all(&files).unwrap();
        command.arg(format!("--data-dir={files}"));
        self.process = Some(Process::spawn(&command, files.as_ref()));
    }

    fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(false);
        }
    }

    fn options(&self) -> EtcdOptions {
        EtcdOptions::new([format!("http://{}:{}", local(), self.port)])
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Restarts the proxy; meanwhile the history moves on and is compacted.
async fn restarts_without_loss(
    proxy: &mut Proxy,
    client: &mut Client,
    group: &str,
    discovery: &ServiceDiscovery,
) {
    proxy.stop();
    eventually("the discovery is stale", || {
        discovery.status() != DiscoveryStatus::Live
    })
    .await;
    client
        .delete(format!("registry/{group}/n1"), None)
        .await
        .unwrap();
    put_node(client, group, "late").await;
    let revision = client
        .get("any", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    client.compact(revision, None).await.unwrap();
    proxy.start();
    let back = Instant::now();
    eventually("the discovery shows the current state", || {
        let nodes = discovery.nodes();
        discovery.status() == DiscoveryStatus::Live
            && nodes.get("late").is_some()
            && nodes.get("n1").is_none()
    })
    .await;
    println!(
        "current state {:?} after the proxy's restart",
        back.elapsed()
    );
    let stalls = Stalls::watch();
    let mut took = Vec::new();
    for index in 0..5 {
        let start = Instant::now();
        put_node(client, group, &format!("after{index}")).await;
        let id = format!("after{index}");
        eventually("the discovery shows the change", || {
            discovery.nodes().get(&id).is_some()
        })
        .await;
        took.push(start.elapsed());
    }
    are_seen_soon(took, &stalls);
}

#[tokio::test]
async fn through_etcds_grpc_proxy_changes_are_seen_as_soon_as_without() {
    if binary().is_none() {
        skipped("it needs an etcd binary, and ETCD_IMAGE is set");
        return;
    }
    let etcd = Etcd::own();
    let group = group("proxied");
    let mut client = etcd.raw_client().await;
    let mut proxy = Proxy {
        port: free_port(),
        target: etcd.address(),
        process: None,
    };
    proxy.start();
    let options = proxy.options();
    let first = builder(&options, &group, "w1").ttl(3);
    let first = Running::new(first.try_build().unwrap());
    within("the node leads", first.node.wait_for_leadership()).await;
    let discovery = ready(&options, &group).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    let stalls = Stalls::watch();
    let mut took = Vec::new();
    let mut count = 1;
    let mut see = async |client: &mut Client, what: &str| {
        let start = Instant::now();
        put_node(client, &group, &format!("n{count}")).await;
        count += 1;
        within(what, discovery.wait_for_nodes(count)).await;
        took.push(start.elapsed());
    };
    for _ in 0..20 {
        see(&mut client, "the discovery shows the change").await;
    }
    // Long enough for progress requests to a quiet server, and for creating the watches again.
    throughout("the discovery stays live", Duration::from_secs(7), || {
        discovery.status() == DiscoveryStatus::Live
    })
    .await;
    for _ in 0..5 {
        see(
            &mut client,
            "the discovery shows a change after a quiet time",
        )
        .await;
    }
    are_seen_soon(took, &stalls);

    // The leader crashes.
    let second = builder(&options, &group, "w2").ttl(3);
    let second = Running::new(second.try_build().unwrap());
    second.wait_until_healthy().await;
    let crashed = Instant::now();
    first.crash();
    within("w2 leads next", second.node.wait_for_leadership()).await;
    println!("w2 leads after {:?}", crashed.elapsed());
    assert!(crashed.elapsed() < Duration::from_secs(6));

    restarts_without_loss(&mut proxy, &mut client, &group, &discovery).await;
    within("w2 still leads", second.node.wait_for_leadership()).await;
    second.crash();
}

/// A member of a cluster whose membership changes.
struct Member {
    name: String,
    client: u16,
    peer: u16,
    process: Option<Process>,
}

impl Member {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            client: free_port(),
            peer: free_port(),
            process: None,
        }
    }

    fn url(port: u16) -> String {
        format!("http://{}:{port}", local())
    }

    fn launch(&mut self, cluster: &[(String, u16)]) {
        let state = if cluster.len() == 1 {
            "new"
        } else {
            "existing"
        };
        self.launch_in(state, cluster);
    }

    fn launch_in(&mut self, state: &str, cluster: &[(String, u16)]) {
        let (client, peer) = (Self::url(self.client), Self::url(self.peer));
        let all: Vec<_> = cluster
            .iter()
            .map(|(name, port)| format!("{name}={}", Self::url(*port)))
            .collect();
        let data = format!("{}/member-{}", env!("CARGO_TARGET_TMPDIR"), self.client);
        let mut command = Command::new(binary().unwrap());
        let arguments = [
            ["--name", &self.name],
            ["--listen-client-urls", &client],
            ["--advertise-client-urls", &client],
            ["--listen-peer-urls", &peer],
            ["--initial-advertise-peer-urls", &peer],
            ["--initial-cluster", &all.join(",")],
            ["--initial-cluster-state", state],
            ["--log-level", "error"],
            ["--data-dir", &data],
        ];
        command
            .args(arguments.as_flattened())
            .arg("--unsafe-no-fsync");
        self.process = Some(Process::spawn(&command, data.as_ref()));
    }

    async fn connect(&self) -> Client {
        Client::connect([Self::url(self.client)], None)
            .await
            .unwrap()
    }

    /// Waits until the member responds to a request that needs a quorum.
    async fn serves(&self) {
        let mut client = self.connect().await;
        let answered = async {
            loop {
                let read = client.get("any", None);
                if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), read).await {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        within("the member serves", answered).await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(false);
        }
    }
}

/// Retries a change of the membership, because a cluster refuses it shortly after the previous one.
async fn change<T, E: std::fmt::Display>(
    what: &str,
    mut change: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let start = Instant::now();
    loop {
        match change().await {
            Ok(done) => return done,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "{what}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn endpoints_follow_the_members_and_learners_are_left_out() {
    if binary().is_none() {
        skipped("it needs an etcd binary, and ETCD_IMAGE is set");
        return;
    }
    let group = group("replaced");
    let mut old = Member::new("m0");
    let mut cluster = vec![(old.name.clone(), old.peer)];
    old.launch(&cluster);
    old.serves().await;
    let first = Member::url(old.client);
    let mut second = Member::new("m1");
    // The second member is added as a learner first.
    let mut client = old.connect().await;
    let options = MemberAddOptions::new().with_is_learner();
    let added = change("add", async || {
        client
            .member_add([Member::url(second.peer)], Some(options.clone()))
            .await
    })
    .await;
    let id = added.member().unwrap().id();
    cluster.push((second.name.clone(), second.peer));
    second.launch(&cluster);
    let both = EtcdOptions::new([Member::url(second.client), first.clone()]);
    let both = both.shuffle_endpoints(false);
    let listens = Instant::now();
    while std::net::TcpStream::connect((local(), second.client)).is_err() {
        assert!(listens.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let registered = Running::start(&both, &group, "beside-a-learner").await;
    registered.stop().await;
    // Both sets of options name the old member only.
    let (with, without) = (
        EtcdOptions::new([first.clone()]).sync_endpoints(true),
        EtcdOptions::new([first.clone()]),
    );
    change("promote", async || client.member_promote(id).await).await;
    second.serves().await;
    let node = Running::start(&with, &group, "follows").await;
    let discovery = ready(&with, &group).await;
    let stays = ready(&without, &group).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    within("the discovery shows the node", stays.wait_for_nodes(1)).await;
    // The old member is removed.
    let mut of_second = second.connect().await;
    let listed = change("list", async || client.member_list().await).await;
    let old_id = listed
        .members()
        .iter()
        .find(|member| member.id() != id)
        .unwrap()
        .id();
    change("remove", async || of_second.member_remove(old_id).await).await;
    if let Some(process) = old.process.take() {
        process.end(false);
    }
    second.serves().await;
    eventually("the discovery is live at the other member", || {
        discovery.status() == DiscoveryStatus::Live
            && discovery.store_status().endpoint == Some(Member::url(second.client))
    })
    .await;
    put_node(&mut of_second, &group, "new").await;
    within(
        "the discovery receives changes",
        discovery.wait_for_nodes(2),
    )
    .await;
    node.wait_until_healthy().await;
    assert_ne!(stays.status(), DiscoveryStatus::Live);
    node.stop().await;
    eventually("the node can leave", || discovery.nodes().len() == 1).await;
}

/// In the end, none of the configured endpoints exists any more.
#[tokio::test]
async fn three_members_are_replaced_by_three_others_one_by_one() {
    if binary().is_none() {
        skipped("it needs an etcd binary, and ETCD_IMAGE is set");
        return;
    }
    let group = group("replaced");
    let mut members: Vec<_> = ["a", "b", "c", "d", "e", "f"].map(Member::new).into();
    let mut cluster: Vec<_> = members[..3]
        .iter()
        .map(|member| (member.name.clone(), member.peer))
        .collect();
    for member in &mut members[..3] {
        member.launch_in("new", &cluster);
    }
    for member in &members[..3] {
        member.serves().await;
    }
    let endpoints = members[..3].iter().map(|member| Member::url(member.client));
    // In this order each connection is to the next member that leaves. The members are read once a minute and after each
    // new connection, and these are all gone within seconds.
    let options = EtcdOptions::new(endpoints)
        .sync_endpoints(true)
        .shuffle_endpoints(false);
    let node = Running::start(&options, &group, "follows").await;
    let discovery = ready(&options, &group).await;
    within("the discovery shows the node", discovery.wait_for_nodes(1)).await;
    for old in 0..3 {
        let (leaving, new) = (members[old].name.clone(), old + 3);
        let mut client = members[new - 1].connect().await;
        let peer = Member::url(members[new].peer);
        change("add", async || {
            client.member_add([peer.clone()], None).await
        })
        .await;
        cluster.push((members[new].name.clone(), members[new].peer));
        members[new].launch_in("existing", &cluster);
        members[new].serves().await;
        let listed = change("list", async || client.member_list().await).await;
        let mut listed = listed.members().iter();
        let id = listed.find(|member| member.name() == leaving).unwrap().id();
        change("remove", async || client.member_remove(id).await).await;
        cluster.retain(|(name, _)| *name != leaving);
        members[old].process.take().unwrap().end(false);
        for member in &members[new - 1..=new] {
            member.serves().await;
        }
        let others: Vec<_> = members[old + 1..=new]
            .iter()
            .map(|member| Some(Member::url(member.client)))
            .collect();
        eventually(
            "the discovery is live at one of the remaining members",
            || {
                discovery.status() == DiscoveryStatus::Live
                    && others.contains(&discovery.store_status().endpoint)
            },
        )
        .await;
        put_node(&mut client, &group, &format!("after-{leaving}")).await;
        within(
            "the discovery receives changes",
            discovery.wait_for_nodes(old + 2),
        )
        .await;
    }
    node.wait_until_healthy().await;
    node.stop().await;
    eventually("the node can leave", || discovery.nodes().len() == 3).await;
}
