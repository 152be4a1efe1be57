//! Nodes and discoveries of `photon-etcd-cluster` 0.1 and of this crate in one group on a real etcd.

mod world;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use etcd_client::{GetOptions, KeyValue, SortOrder, SortTarget};
use world::{Etcd, Kind, Led, Member, Views, etcdctl, until};

/// Programs as the README of `photon-etcd-cluster` shows them. The same text is compiled against both
/// crates: only the name differs.
mod readme {
    pub mod ours {
        use pingora_etcd as cluster;
        include!("readme.rs");
    }
    pub mod theirs {
        use photon_etcd_cluster as cluster;
        include!("readme.rs");
    }
}

async fn until_registered(etcd: &Etcd, group: &str, id: &str) {
    let mut client = etcd.client().await;
    let key = format!("registry/{group}/{id}");
    until(&format!("{key} is there"), async || {
        let found = client.get(key.as_str(), None).await.unwrap();
        !found.kvs().is_empty()
    })
    .await;
}

/// The candidates that lead or wait, in the order of their turns.
async fn queue(etcd: &Etcd, group: &str) -> Vec<KeyValue> {
    let options = GetOptions::new()
        .with_prefix()
        .with_sort(SortTarget::Create, SortOrder::Ascend);
    let prefix = format!("election/{group}/");
    let found = etcd.client().await.get(prefix, Some(options)).await;
    found.unwrap().take_kvs()
}

/// Of which nodes they are.
async fn candidates(etcd: &Etcd, group: &str) -> Vec<String> {
    let queue = queue(etcd, group).await;
    let values = queue.iter();
    values
        .map(|entry| entry.value_str().unwrap_or_default().to_owned())
        .collect()
}

/// One of a kind leads and one of the other waits; the first ends, by a crash or in order.
async fn the_other_is_next(first: Kind, crash: bool) {
    let etcd = Etcd::start().await;
    let group = "g";
    let views = Views::of(&etcd, group).await;
    let leader = Member::start(first, &etcd, group, "first");
    until("the first one leads", async || leader.leads()).await;
    views.until_leader(Some("first")).await;
    let next = Member::start(first.other(), &etcd, group, "second");
    until("the second one waits", async || {
        candidates(&etcd, group).await == ["first", "second"]
    })
    .await;
    views.until_nodes(&["first", "second"]).await;
    assert!(!next.leads());
    let before = if crash { leader.crash() } else { leader.stop() };
    until("the second one leads", async || next.leads()).await;
    views.until_leader(Some("second")).await;
    views.until_nodes(&["second"]).await;
    let after = next.stop();
    views.until_leader(None).await;
    views.until_nodes(&[]).await;
    assert!(!overlap(&before, &after), "{before:?} {after:?}");
}

/// One leads, and one of either kind that waits goes: nothing changes for the views.
#[tokio::test]
async fn the_leader_stays_in_the_views_when_one_that_waits_goes() {
    let etcd = Etcd::start().await;
    let group = "g";
    let views = Views::of(&etcd, group).await;
    let leader = Member::start(Kind::Ours, &etcd, group, "first");
    until("the first one leads", async || leader.leads()).await;
    let term = async || queue(&etcd, group).await[0].create_revision();
    let before = term().await;
    for (kind, crash) in [
        (Kind::Theirs, false),
        (Kind::Ours, false),
        (Kind::Theirs, true),
    ] {
        let waiting = Member::start(kind, &etcd, group, "second");
        until("the second one waits", async || {
            candidates(&etcd, group).await == ["first", "second"]
        })
        .await;
        views.until_nodes(&["first", "second"]).await;
        match crash {
            true => waiting.crash(),
            false => waiting.stop(),
        };
        until("the second one is gone", async || {
            candidates(&etcd, group).await == ["first"]
        })
        .await;
        views.until_nodes(&["first"]).await;
        views.until_leader(Some("first")).await;
        assert_eq!(term().await, before, "its term has not ended");
        until("it leads still", async || leader.leads()).await;
    }
}

fn overlap(one: &[Led], other: &[Led]) -> bool {
    let mut pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a, b)));
    pairs.any(|(a, b)| a.from < b.to && b.from < a.to)
}

#[tokio::test]
async fn theirs_after_ours_that_crashed() {
    the_other_is_next(Kind::Ours, true).await;
}

#[tokio::test]
async fn theirs_after_ours_that_stopped() {
    the_other_is_next(Kind::Ours, false).await;
}

#[tokio::test]
async fn ours_after_theirs_that_crashed() {
    the_other_is_next(Kind::Theirs, true).await;
}

#[tokio::test]
async fn ours_after_theirs_that_stopped() {
    the_other_is_next(Kind::Theirs, false).await;
}

/// A candidate of etcd's own command line waits for ours, leads after it, and ours waits for it.
#[tokio::test]
async fn a_candidate_of_etcdctl_takes_its_turn() {
    let Some(etcdctl) = etcdctl() else { return };
    let etcd = Etcd::start().await;
    let group = "g";
    let ours = Member::start(Kind::Ours, &etcd, group, "ours");
    until("ours leads", async || ours.leads()).await;
    let mut elect = Command::new(etcdctl)
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &etcd.endpoint, "elect"])
        .args([&format!("election/{group}"), "by-hand"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("etcdctl waits", async || {
        candidates(&etcd, group).await == ["ours", "by-hand"]
    })
    .await;
    let next = Member::start(Kind::Ours, &etcd, group, "next");
    until("the next one waits", async || {
        candidates(&etcd, group).await == ["ours", "by-hand", "next"]
    })
    .await;
    let views = Views::of(&etcd, group).await;
    let before = ours.stop();
    until("etcdctl is first", async || {
        candidates(&etcd, group).await == ["by-hand", "next"]
    })
    .await;
    // Its candidate is no registered node, so ours shows no leader.
    views.until_nodes(&["next"]).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        assert!(!next.leads(), "while the candidate of etcdctl is first");
        assert_eq!(views.both().0.1, None);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let pid = elect.id().to_string();
    let sent = Command::new("kill").args(["-s", "INT", &pid]).status();
    assert!(sent.unwrap().success());
    elect.wait().unwrap();
    until("ours leads again", async || next.leads()).await;
    views.until_leader(Some("next")).await;
    assert!(!overlap(&before, &next.stop()));
}

/// How long members come and go.
fn churn_time() -> Duration {
    let given = std::env::var("CHURN_SECONDS").ok();
    Duration::from_secs(given.map_or(60, |seconds| seconds.parse().expect("CHURN_SECONDS")))
}

#[tokio::test]
async fn ten_come_and_go() {
    let etcd = Etcd::start().await;
    let group = "g";
    let ids = |kind: Kind| (0..5).map(move |number| (kind, format!("{}-{number}", kind.name())));
    let all: Vec<_> = Kind::BOTH.into_iter().flat_map(ids).collect();
    let start_of = |(kind, id): &(Kind, String)| Member::start(*kind, &etcd, group, id);
    let views = Views::of(&etcd, group).await;
    let mut members: Vec<Option<Member>> = all.iter().map(|one| Some(start_of(one))).collect();
    let mut led: Vec<(Kind, String, Vec<Led>)> = Vec::new();
    let (mut crashes, mut stops) = (0, 0);
    let start = Instant::now();
    while start.elapsed() < churn_time() {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..900))).await;
        // The leader as often as one that waits: else hardly a term would end.
        let leads = members
            .iter()
            .position(|member| member.as_ref().is_some_and(Member::leads));
        let chosen = leads.filter(|_| fastrand::bool());
        let chosen = chosen.unwrap_or_else(|| fastrand::usize(..members.len()));
        let Some(member) = members[chosen].take() else {
            members[chosen] = Some(start_of(&all[chosen]));
            continue;
        };
        let (kind, id) = (member.kind, member.id.clone());
        let ended = tokio::task::spawn_blocking(move || {
            if fastrand::bool() {
                (true, member.crash())
            } else {
                (false, member.stop())
            }
        });
        let (crashed, terms) = ended.await.unwrap();
        if crashed {
            crashes += 1;
        } else {
            stops += 1;
        }
        led.push((kind, id, terms));
        if fastrand::bool() {
            members[chosen] = Some(start_of(&all[chosen]));
        }
    }
    for (member, one) in members.iter_mut().zip(&all) {
        member.get_or_insert_with(|| start_of(one));
    }
    let names: Vec<_> = all.iter().map(|(_, id)| id.as_str()).collect();
    views.until_nodes(&names).await;
    for (_, id) in &all {
        until_registered(&etcd, group, id).await;
    }
    until("there is a candidate of each", async || {
        candidates(&etcd, group).await.len() == all.len()
    })
    .await;
    let first = candidates(&etcd, group).await.swap_remove(0);
    views.until_leader(Some(&first)).await;

    for member in members.into_iter().flatten() {
        let (kind, id) = (member.kind, member.id.clone());
        led.push((kind, id, member.crash()));
    }
    let terms = |kind| {
        let of_kind = led.iter().filter(move |(of, ..)| *of == kind);
        of_kind.map(|(.., terms)| terms.len()).sum::<usize>()
    };
    println!(
        "{crashes} crashes, {stops} stops; terms: {} of ours, {} of theirs",
        terms(Kind::Ours),
        terms(Kind::Theirs)
    );
    assert!(terms(Kind::Ours) > 0 && terms(Kind::Theirs) > 0);
    for (index, (kind, id, terms)) in led.iter().enumerate() {
        for (other_kind, other_id, others) in &led[index + 1..] {
            // Two of theirs are not ours to judge.
            if [*kind, *other_kind].contains(&Kind::Ours) {
                assert!(
                    !overlap(terms, others),
                    "{id} {terms:?} and {other_id} {others:?} led at once"
                );
            }
        }
    }
}

/// Runs a program of the README, as compiled against each crate, on an etcd of its own.
macro_rules! programs {
    ($($name:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let etcd = Etcd::start().await;
            let run = async |group: &str| {
                let (endpoint, group) = (etcd.endpoint.clone(), group.to_owned());
                match group.as_str() {
                    "ours" => readme::ours::$name(endpoint, group).await,
                    _ => readme::theirs::$name(endpoint, group).await,
                }
            };
            for group in ["ours", "theirs"] {
                tokio::time::timeout(world::DEADLINE, run(group))
                    .await
                    .unwrap_or_else(|_| panic!("{group}: not within {:?}", world::DEADLINE));
            }
        }
    )*};
}

programs!(
    worker,
    load_balancer,
    events,
    watched_count,
    system_metrics,
    own_collector,
    metrics_read,
    proxy_backends,
);
