//! The faults that are injected into the cluster of three members. Each fault has ended when its
//! function returns.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pingora_etcd::{ClusterError, worker::SessionState};
use tokio::time::sleep;

use super::common::stalls::Stalls;
use super::fleet::TTL;
use super::netns;
use super::single;
use super::world::World;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillFollower,
    KillLeader,
    KillTwo,
    StopFollower,
    StopLeader,
    SilentWorker,
    SilentLeader,
    SilentBalancer,
    Compaction,
    CrashLeader,
    CrashWhileStopped,
    Namespace,
    /// From here on: not faults, but operations that must not disturb anybody.
    HandOver,
    Drain,
    RestartLeader,
    StartBeside,
    RestartTarget,
    /// From here on: only for the cluster with a single member.
    Restart,
    NoSpace,
    Restore,
}

pub const ON_THREE: [Fault; 17] = [
    Fault::HandOver,
    Fault::Drain,
    Fault::RestartLeader,
    Fault::StartBeside,
    Fault::RestartTarget,
    Fault::KillFollower,
    Fault::KillLeader,
    Fault::KillTwo,
    Fault::StopFollower,
    Fault::StopLeader,
    Fault::SilentWorker,
    Fault::SilentLeader,
    Fault::SilentBalancer,
    Fault::Compaction,
    Fault::CrashLeader,
    Fault::CrashWhileStopped,
    Fault::Namespace,
];
pub const ON_ONE: [Fault; 3] = [Fault::Restart, Fault::NoSpace, Fault::Restore];

/// What was found while a fault lasted.
#[derive(Default)]
pub struct Found {
    /// From a crash, or from the moment a worker was cut off, until no discovery has the node any
    /// more.
    pub gone_after: Option<Duration>,
    /// From the end of the fault until everything was well, where the fault's function waited for
    /// that itself.
    pub healed_after: Option<Duration>,
    pub notes: Vec<String>,
    pub failures: Vec<String>,
    pub skipped: Option<String>,
    /// The leases that were being renewed when etcd's replaced leader was resumed.
    renewed: BTreeMap<String, i64>,
    /// How many of them etcd revoked nevertheless.
    pub revoked: usize,
}

impl Found {
    pub fn gone(&mut self, gone: Result<Duration, String>) {
        match gone {
            Ok(after) => self.gone_after = Some(after),
            Err(failure) => self.failures.push(failure),
        }
    }

    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Counts the leases that etcd revoked by mistake. An etcd leader that was stopped and is
    /// resumed may revoke every lease that was not renewed *with it*, although another member leads
    /// and renews them: etcd-io/etcd#15247, which also occurs in 3.5.16. A client cannot know of it
    /// before etcd reports it.
    pub async fn count_revoked_leases(&mut self, world: &World) {
        if self.renewed.is_empty() {
            return;
        }
        if let Ok(now) = world.fleet.renewed_leases(&world.cluster).await {
            let before = self.renewed.iter();
            let lost = before.filter(|(id, lease)| now.get(*id).is_some_and(|now| now != *lease));
            self.revoked = lost.count();
        }
    }

    pub fn check(&mut self, what: Result<(), String>) {
        self.failures.extend(what.err());
    }
}

/// How long the expiry of a lease may take until every discovery has seen it: the TTL, plus an
/// election of etcd, plus the time after which a discovery notices that a member is silent (13 s).
pub const EXPIRY_LIMIT: Duration = Duration::from_secs(TTL + 20);

/// How late etcd's replaced leader may still revoke leases: it revokes 16 at a time, and the next
/// ones when its own time limit for a revocation is over (5 s and two election timeouts).
const LATE_REVOCATIONS: Duration = Duration::from_secs(8);

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::KillFollower => "kill an etcd follower",
            Self::KillLeader => "kill etcd's leader",
            Self::KillTwo => "kill two members",
            Self::StopFollower => "stop an etcd follower",
            Self::StopLeader => "stop etcd's leader",
            Self::SilentWorker => "cut off a worker",
            Self::SilentLeader => "cut off the leader",
            Self::SilentBalancer => "cut off the balancer",
            Self::Compaction => "compact, defragment",
            Self::CrashLeader => "crash the leader",
            Self::CrashWhileStopped => "crash it, stop etcd's",
            Self::Namespace => "drop packets (netns)",
            Self::HandOver => "hand leadership over",
            Self::Drain => "drain a worker",
            Self::RestartLeader => "restart the leader",
            Self::StartBeside => "two under one id",
            Self::RestartTarget => "hand over to a restarted",
            Self::Restart => "restart a single etcd",
            Self::NoSpace => "etcd's disk is full",
            Self::Restore => "restore older data",
        }
    }

    /// Whether the fault is short enough for a short run.
    pub fn is_quick(self) -> bool {
        self != Self::CrashWhileStopped
    }

    pub async fn inject(self, world: &mut World, found: &mut Found) {
        match self {
            Self::KillFollower => kill_follower(world).await,
            Self::KillLeader => kill_leader(world, found).await,
            Self::KillTwo => kill_two(world, found).await,
            Self::StopFollower => {
                let leader = world.cluster.leader().await;
                let member = world.other_member(leader);
                stop(world, member, false, found).await;
            }
            Self::StopLeader => {
                let member = world.cluster.leader().await;
                stop(world, member, true, found).await;
            }
            Self::SilentWorker => {
                let worker = world.other_worker().await;
                cut_off(world, worker, found).await;
            }
            Self::SilentLeader => {
                let worker = world.leading_worker().await;
                cut_off(world, worker, found).await;
            }
            Self::SilentBalancer => {
                world.balancer.set_silent(true);
                let lasts = world.longer_than_ttl();
                sleep(lasts).await;
                world.balancer.set_silent(false);
            }
            Self::Compaction => compaction(world, found).await,
            Self::CrashLeader => {
                let worker = world.leading_worker().await;
                crash(world, worker, found).await;
            }
            Self::CrashWhileStopped => {
                let member = world.cluster.leader().await;
                let worker = world.leading_worker().await;
                world.cluster.pause(member);
                crash(world, worker, found).await;
                resume_member(world, member, true, found).await;
            }
            Self::Namespace => netns::drop_packets(world, found).await,
            Self::HandOver => hand_over(world, found).await,
            Self::Drain => drain(world, found).await,
            Self::RestartLeader => restart_leader(world, found).await,
            Self::StartBeside => start_beside(world, found).await,
            Self::RestartTarget => restart_target(world, found).await,
            Self::Restart => single::restart(world, found).await,
            Self::NoSpace => single::no_space(world, found).await,
            Self::Restore => single::restore(world, found).await,
        }
    }
}

/// Transfers leadership from the leader to any other worker, repeatedly and under load. The
/// candidates ahead of the target in the queue make way.
async fn hand_over(world: &mut World, found: &mut Found) {
    const TIMES: u32 = 20;
    const WITHOUT: Duration = Duration::from_millis(100);
    let mut longest = Duration::ZERO;
    // Why transfers were asked for again, as on a machine that stood still.
    let mut again = Vec::new();
    for _ in 0..TIMES {
        let leader = world.leading_worker().await;
        let target = world.other_worker().await;
        let workers = &world.fleet.workers;
        let (Some(mut from), Some(to)) = (workers[leader].node(), workers[target].node()) else {
            continue;
        };
        let start = Instant::now();
        let mut handing = Box::pin(from.transfer_to(to.id()));
        let mut ended = None;
        let mut is_over = false;
        while !to.is_leader() {
            tokio::select! {
                answer = &mut handing, if !is_over => match answer {
                    Ok(()) => {
                        is_over = true;
                        ended.get_or_insert_with(Instant::now);
                    }
                    // The target has just left the queue to make way in the transfer before this
                    // one.
                    Err(ClusterError::TransferRefused { reason, .. })
                        if reason.contains("not a candidate") =>
                    {
                        sleep(Duration::from_millis(50)).await;
                        handing = Box::pin(from.transfer_to(to.id()));
                    }
                    Err(error) if may_pass(&error) => {
                        again.push(error.to_string());
                        sleep(Duration::from_millis(50)).await;
                        let now = world.fleet.leader().and_then(|leader| workers[leader].node());
                        if let Some(leader) = now {
                            (from, ended) = (leader, None);
                        }
                        handing = Box::pin(from.transfer_to(to.id()));
                    }
                    Err(error) => {
                        found.failures.push(format!("{} to {}: {error}", from.id(), to.id()));
                        return;
                    }
                },
                () = sleep(Duration::from_millis(1)) => {}
            }
            if !from.is_leader() {
                ended.get_or_insert_with(Instant::now);
            }
            if start.elapsed() > Duration::from_secs(10) {
                found
                    .failures
                    .push(format!("{} did not become leader within 10 s", to.id()));
                return;
            }
        }
        longest = longest.max(ended.map_or(Duration::ZERO, |ended| ended.elapsed()));
    }
    found.note(format!(
        "{TIMES} transfers, asked for again {} times, at most {longest:.1?} without a leader",
        again.len()
    ));
    // As with the targets: only a long run enforces the limits, because the timings of a short run
    // are too noisy.
    if !world.long {
        return;
    }
    if let Some(why) = again.first() {
        let failure = format!("a transfer had to be asked for again: {why}");
        found.failures.push(failure);
    }
    if longest > WITHOUT {
        found
            .failures
            .push(format!("{longest:.1?} without a leader, limit {WITHOUT:?}"));
    }
}

/// Whether a transfer that has failed like this may succeed when the leader is asked again: somebody was too slow, or
/// does not lead any more. A store that fails for a moment is no reason: a transfer waits for it.
fn may_pass(error: &ClusterError) -> bool {
    match error {
        ClusterError::NotLeader { .. } => true,
        ClusterError::TransferRefused { reason, .. } => {
            reason.contains("has not made way") || reason.contains("has just left")
        }
        _ => false,
    }
}

/// As before an upgrade: the worker drains, is stopped when it receives no more requests, and is
/// started again. In half of the cases it is the leader.
async fn drain(world: &mut World, found: &mut Found) {
    let leads = !world.long || world.rng.bool();
    let worker = match leads {
        true => world.leading_worker().await,
        false => world.other_worker().await,
    };
    let id = world.fleet.workers[worker].id.clone();
    let Some(node) = world.fleet.workers[worker].node() else {
        return;
    };
    if let Err(error) = node.drain().await {
        found.failures.push(format!("{id} cannot drain: {error}"));
        return;
    }
    if node.is_leader() {
        found.failures.push(format!("{id} is draining, but leads"));
    }
    let start = Instant::now();
    // Until the worker has read its own state `Draining` back from the store.
    while node.session_state() != SessionState::Draining {
        if start.elapsed() > EXPIRY_LIMIT {
            let state = node.session_state();
            found.failures.push(format!(
                "{id} is draining, but its session state is {state}"
            ));
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
    if !wait_until_idle(world, worker, start, found).await {
        return;
    }
    check_shown_as_draining(world, &id, found).await;
    world.fleet.workers[worker].stop().await;
    world.fleet.changed();
    found.gone(world.fleet.until_gone(&id, EXPIRY_LIMIT).await);
    world.fleet.workers[worker].start().await;
    world.fleet.changed();
}

/// Waits until a draining worker receives no more requests; returns whether that happened in time.
async fn wait_until_idle(world: &World, worker: usize, start: Instant, found: &mut Found) -> bool {
    /// If a worker under load receives no request for this long, no balancer picks it any more.
    const IDLE: Duration = Duration::from_millis(500);
    let worker = &world.fleet.workers[worker];
    let (mut requests, mut since) = (worker.requests(), Instant::now());
    while since.elapsed() < IDLE {
        let now = worker.requests();
        if now != requests {
            (requests, since) = (now, Instant::now());
        }
        if start.elapsed() > EXPIRY_LIMIT {
            found.failures.push(format!(
                "{} is draining, but still receives requests",
                worker.id
            ));
            return false;
        }
        sleep(Duration::from_millis(2)).await;
    }
    found.note(format!(
        "last request after {:.1?}",
        start.elapsed() - since.elapsed()
    ));
    true
}

/// Waits until every discovery shows the node as draining.
async fn check_shown_as_draining(world: &World, id: &str, found: &mut Found) {
    let start = Instant::now();
    for watching in &world.fleet.watching {
        loop {
            let nodes = watching.discovery.nodes();
            let shows = match nodes.get(id) {
                Some(node) if !node.is_serving() => break,
                Some(_) => "shows it as serving",
                None => "does not have it",
            };
            if start.elapsed() > EXPIRY_LIMIT {
                let failure = format!("{id} is draining, but a discovery {shows}");
                found.failures.push(failure);
                break;
            }
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Restarts the leader as a supervisor does: long before the lease of the previous process expires.
/// The monitor checks that no reader confuses the two processes.
async fn restart_leader(world: &mut World, found: &mut Found) {
    let worker = world.leading_worker().await;
    let before = term_of(world, worker);
    world.fleet.workers[worker].crash();
    let start = Instant::now();
    world.fleet.workers[worker].start().await;
    world.fleet.changed();
    let next = world.leading_worker().await;
    found.note(format!(
        "{} leads after {:.1?}",
        world.fleet.workers[next].id,
        start.elapsed()
    ));
    let after = term_of(world, next);
    if after <= before {
        found
            .failures
            .push(format!("token {after:?} is not greater than {before:?}"));
    }
}

fn term_of(world: &World, worker: usize) -> Option<i64> {
    let node = world.fleet.workers[worker].node()?;
    Some(node.leadership()?.epoch)
}

/// Cuts the leader off and starts a second process under its id. When the first one is reachable
/// again, it must notice that it was replaced.
async fn start_beside(world: &mut World, found: &mut Found) {
    let worker = world.leading_worker().await;
    let start = Instant::now();
    world.fleet.start_beside(worker).await;
    let lasts = world.longer_than_ttl();
    sleep(lasts.saturating_sub(start.elapsed())).await;
    let id = world.fleet.workers[worker].id.clone();
    let replaced = &world.fleet.replaced[0];
    if replaced.leads() {
        found
            .failures
            .push(format!("{id} leads {lasts:?} after it was cut off"));
    }
    replaced.set_silent(false);
    let heard = Instant::now();
    while !replaced.is_superseded() {
        if heard.elapsed() > EXPIRY_LIMIT {
            found
                .failures
                .push(format!("{id} does not notice that it was replaced"));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(1) {
        if replaced.leads() {
            found.failures.push(format!(
                "{id} leads, although another process has taken over its id"
            ));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    world.fleet.replaced.clear();
    world.fleet.changed();
}

/// Restarts a worker and transfers leadership to it immediately. The transfer must reach the
/// running process, although the candidacy of the previous one is still ahead of it in the queue.
async fn restart_target(world: &mut World, found: &mut Found) {
    let target = world.other_worker().await;
    world.fleet.workers[target].crash();
    world.fleet.workers[target].start().await;
    world.fleet.changed();
    let start = Instant::now();
    loop {
        let leader = world.leading_worker().await;
        let workers = &world.fleet.workers;
        let (Some(from), Some(to)) = (workers[leader].node(), workers[target].node()) else {
            return;
        };
        match from.transfer_to(to.id()).await {
            Ok(()) => {
                let (stalls, handed) = (Stalls::watch(), Instant::now());
                let leads = async {
                    while !to.is_leader() && handed.elapsed() < EXPIRY_LIMIT {
                        sleep(Duration::from_millis(1)).await;
                    }
                    handed.elapsed()
                };
                let (first, took) = tokio::join!(check_first_in_queue(world, to.id()), leads);
                found.check(first);
                let after = handed - start;
                found.note(format!(
                    "transferred after {after:.1?}, leads {took:.1?} later"
                ));
                // A transfer to the candidacy of the previous process would take effect only when
                // its lease expires.
                if took > Duration::from_secs(1) + stalls.so_far() {
                    let failure = format!("{} leads {took:.1?} after the transfer", to.id());
                    found.failures.push(failure);
                }
                return;
            }
            // The target is not in the queue yet; or the candidacy of its previous process is ahead
            // of it, and makes way for nobody until its lease expires.
            Err(ClusterError::TransferRefused { .. } | ClusterError::NotLeader { .. })
                if start.elapsed() < EXPIRY_LIMIT => {}
            Err(error) => {
                let failure = format!("{} to {}: {error}", from.id(), to.id());
                found.failures.push(failure);
                return;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Checks that the process that is registered under this id now is first in the queue.
async fn check_first_in_queue(world: &World, id: &str) -> Result<(), String> {
    let group = &world.fleet.group;
    let election = format!("election/{group}/");
    let queue = world.cluster.until_listed(&election).await?;
    let first = queue.iter().min_by_key(|entry| entry.create_revision());
    let first = first.ok_or("nobody is in the queue after a transfer")?;
    let key = format!("registry/{group}/{id}");
    let entries = world.cluster.until_listed(&key).await?;
    let mut entries = entries.iter();
    let registered = entries.find(|entry| entry.key() == key.as_bytes());
    if registered.map(etcd_client::KeyValue::lease) == Some(first.lease()) {
        return Ok(());
    }
    Err(format!(
        "first in the queue after the transfer to {id} is {:?} with lease {:x}, but {id} has {:x?}",
        first.value_str(),
        first.lease(),
        registered.map(etcd_client::KeyValue::lease)
    ))
}

async fn kill_follower(world: &mut World) {
    let leader = world.cluster.leader().await;
    let member = world.other_member(leader);
    world.cluster.kill(member);
    let lasts = if world.long {
        world.rng.u64(200..5000)
    } else {
        1000
    };
    sleep(Duration::from_millis(lasts)).await;
    world.cluster.restart(member).await;
}

async fn kill_leader(world: &mut World, found: &mut Found) {
    let member = world.cluster.leader().await;
    let start = Instant::now();
    world.cluster.kill(member);
    world.cluster.leader().await;
    found.note(format!("etcd elected after {:.1?}", start.elapsed()));
    world.cluster.restart(member).await;
}

async fn kill_two(world: &mut World, found: &mut Found) {
    let first = world.cluster.leader().await;
    let second = world.other_member(first);
    world.cluster.kill(first);
    world.cluster.kill(second);
    let start = Instant::now();
    let deadline = Duration::from_secs(TTL);
    let lasts = world.longer_than_ttl();
    sleep(deadline).await;
    // No lease can be renewed, so every local deadline has passed by now, and it stays so until
    // etcd is restarted.
    while start.elapsed() < lasts {
        if let Some(worker) = world.fleet.leader() {
            let id = &world.fleet.workers[worker].id;
            found.failures.push(format!(
                "{id} leads {:.1?} after etcd lost its quorum",
                start.elapsed()
            ));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    world.cluster.launch(first);
    world.cluster.restart(second).await;
}

async fn stop(world: &mut World, member: usize, led: bool, found: &mut Found) {
    world.cluster.pause(member);
    let lasts = world.longer_than_ttl();
    sleep(lasts).await;
    resume_member(world, member, led, found).await;
}

/// `led`: whether the member was etcd's leader when it was stopped.
async fn resume_member(world: &mut World, member: usize, led: bool, found: &mut Found) {
    if led {
        match world.fleet.renewed_leases(&world.cluster).await {
            Ok(renewed) => found.renewed = renewed,
            Err(error) => found.note(format!("leases before the member is resumed: {error}")),
        }
    }
    world.cluster.resume(member);
    let start = Instant::now();
    world.cluster.wait_until_all_serve().await;
    if !world.long || !led {
        return;
    }
    match world.heal().await {
        Ok(healed) => found.healed_after = Some(healed.after),
        Err(problems) => found.failures.extend(problems),
    }
    // Late revocations must be counted here, and not with the next fault.
    sleep(LATE_REVOCATIONS.saturating_sub(start.elapsed())).await;
}

async fn cut_off(world: &mut World, worker: usize, found: &mut Found) {
    let lasts = world.longer_than_ttl();
    let start = Instant::now();
    let led = world.fleet.workers[worker].is_leader();
    world.fleet.workers[worker].links.set_silent(true);
    if led {
        // The leader must stop at its own deadline at the latest: that is the TTL less the margin
        // after the last renewal, which was sent before now.
        // A busy machine may notice late that it has stopped, but not that it still led.
        let mut led = Duration::ZERO;
        while start.elapsed() < lasts {
            let asked = start.elapsed();
            if !world.fleet.workers[worker].is_leader() {
                break;
            }
            led = asked;
            sleep(Duration::from_millis(2)).await;
        }
        found.note(format!("stopped leading after {:.2?}", start.elapsed()));
        if led > Duration::from_secs(TTL) {
            let id = &world.fleet.workers[worker].id;
            let failure =
                format!("{id} still led {led:.2?} after it was cut off, longer than its TTL");
            found.failures.push(failure);
        }
    }
    let left = EXPIRY_LIMIT.saturating_sub(start.elapsed());
    let gone = world
        .fleet
        .until_gone(&world.fleet.workers[worker].id, left)
        .await;
    found.gone(gone.map(|_| start.elapsed()));
    sleep(lasts.saturating_sub(start.elapsed())).await;
    world.fleet.workers[worker].links.set_silent(false);
}

/// The worker crashes, disappears from every discovery, and is started again.
pub async fn crash(world: &mut World, worker: usize, found: &mut Found) {
    world.fleet.workers[worker].crash();
    world.fleet.changed();
    let id = world.fleet.workers[worker].id.clone();
    found.gone(world.fleet.until_gone(&id, EXPIRY_LIMIT).await);
    world.fleet.workers[worker].start().await;
    world.fleet.changed();
}

/// Meanwhile one discovery is cut off, so that the events it missed are compacted when it
/// reconnects.
async fn compaction(world: &mut World, found: &mut Found) {
    let result = async {
        let away = &world.fleet.watching[0];
        let seen = away.discovery.nodes().revision();
        away.links.set_silent(true);
        let start = Instant::now();
        let revision = loop {
            // The workers write their metrics every second.
            let status = world.cluster.status(0).await;
            match status.map(|status| status.revision) {
                Ok(revision) if revision > seen + 30 => break revision,
                other if start.elapsed() > EXPIRY_LIMIT => {
                    return Err(format!(
                        "etcd is only at revision {other:?} after {EXPIRY_LIMIT:?}, it was at {seen}"
                    ));
                }
                _ => sleep(Duration::from_millis(10)).await,
            }
        };
        world.cluster.compact(revision, false).await?;
        for member in 0..world.cluster.size() {
            world.cluster.defragment(member).await?;
        }
        Ok(format!("compacted up to {revision}"))
    };
    match result.await {
        Ok(note) => found.note(note),
        Err(failure) => found.failures.push(failure),
    }
    let away = &world.fleet.watching[0];
    away.links.cut();
    away.links.set_silent(false);
}
