//! What is done to the cluster of three members. Each fault is over when its function returns.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pingora_etcd::{ClusterError, worker::SessionState};
use tokio::time::sleep;

use super::etcd_cluster::answered;
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
    /// No fault: what must not look like one.
    HandOver,
    Drain,
    RestartLeader,
    StartBeside,
    RestartTarget,
    /// On a single member, from here on.
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

/// What a fault found while it lasted.
#[derive(Default)]
pub struct Found {
    /// From a crash, or from being cut off, to all discoveries without the node.
    pub gone_after: Option<Duration>,
    /// From the end of the fault until all was well, where the function saw to that itself.
    pub healed_after: Option<Duration>,
    pub notes: Vec<String>,
    pub failures: Vec<String>,
    pub skipped: Option<String>,
    /// Leases that were being renewed when etcd's old leader went on.
    renewed: BTreeMap<String, i64>,
    /// How many of them etcd has revoked all the same.
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

    /// An etcd leader that was stopped and goes on may revoke every lease that has not been renewed
    /// *with it*, although another member leads and renews them: etcd-io/etcd#15247, which is seen
    /// in 3.5.16 all the same. Nobody can know of it before etcd tells.
    pub async fn judge_etcd(&mut self, world: &World) {
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

/// For a lease to run out and be seen to: the TTL, what etcd takes to elect, and what a discovery
/// takes to find out that it listens to a member that says nothing (13 s).
pub const GONE: Duration = Duration::from_secs(TTL + 20);

/// An old leader of etcd asks for 16 leases to be revoked, and for the next ones when its own time
/// limit for that is over: 5 s and two election time-outs.
const LATE: Duration = Duration::from_secs(8);

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

    /// Whether it is worth its time in a short run.
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
                go_on(world, member, true, found).await;
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

/// From the leader to any other worker, again and again, under load: those ahead of it make way.
async fn hand_over(world: &mut World, found: &mut Found) {
    const TIMES: u32 = 20;
    const WITHOUT: Duration = Duration::from_millis(100);
    let mut longest = Duration::ZERO;
    for _ in 0..TIMES {
        let leader = world.leading_worker().await;
        let target = world.other_worker().await;
        let workers = &world.fleet.workers;
        let (Some(from), Some(to)) = (workers[leader].node(), workers[target].node()) else {
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
                    // It has made way just now, for the one before.
                    Err(ClusterError::TransferRefused { reason, .. })
                        if reason.contains("not a candidate") =>
                    {
                        sleep(Duration::from_millis(50)).await;
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
                found.failures.push(format!("{} does not lead", to.id()));
                return;
            }
        }
        longest = longest.max(ended.map_or(Duration::ZERO, |ended| ended.elapsed()));
    }
    found.note(format!(
        "{TIMES} times, at most {longest:.1?} without a leader"
    ));
    // As the targets: a figure in the short form, for machines are noisy; a limit in the long one.
    if longest > WITHOUT && world.long {
        found.failures.push(format!(
            "{longest:.1?} without a leader, more than {WITHOUT:?}"
        ));
    }
}

/// As before a new version: it says that it drains, is stopped when nobody sends to it any more, and
/// starts again. Half the time it leads.
async fn drain(world: &mut World, found: &mut Found) {
    /// Without a request, under load: then no balancer picks it.
    const IDLE: Duration = Duration::from_millis(500);
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
        found.failures.push(format!("{id} drains, and leads"));
    }
    let start = Instant::now();
    // It reads that the store has it.
    while node.session_state() != SessionState::Draining {
        if start.elapsed() > GONE {
            let state = node.session_state();
            found.failures.push(format!("{id} drains, and is {state}"));
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
    let (mut requests, mut since) = (world.fleet.workers[worker].requests(), Instant::now());
    while since.elapsed() < IDLE {
        let now = world.fleet.workers[worker].requests();
        if now != requests {
            (requests, since) = (now, Instant::now());
        }
        if start.elapsed() > GONE {
            found
                .failures
                .push(format!("{id} drains, and is sent requests"));
            return;
        }
        sleep(Duration::from_millis(2)).await;
    }
    found.note(format!(
        "the last request after {:.1?}",
        start.elapsed() - since.elapsed()
    ));
    for watching in &world.fleet.watching {
        let nodes = watching.discovery.nodes();
        match nodes.get(&id) {
            Some(node) if !node.is_serving() => {}
            Some(_) => found
                .failures
                .push(format!("{id} drains, and is seen to serve")),
            None => found.failures.push(format!("{id} drains, and is not seen")),
        }
    }
    world.fleet.workers[worker].stop().await;
    world.fleet.changed();
    found.gone(world.fleet.until_gone(&id, GONE).await);
    world.fleet.workers[worker].start().await;
    world.fleet.changed();
}

/// As a supervisor does it: long before the lease of the former life runs out. That readers do not
/// take one for the other is seen by the monitor.
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
            .push(format!("token {after:?} after {before:?}"));
    }
}

fn term_of(world: &World, worker: usize) -> Option<i64> {
    let node = world.fleet.workers[worker].node()?;
    Some(node.leadership()?.epoch)
}

/// The leader is cut off, and a second process is started under its id. When the first is heard
/// again it has to see that it is not the one any more.
async fn start_beside(world: &mut World, found: &mut Found) {
    let worker = world.leading_worker().await;
    let start = Instant::now();
    world.fleet.start_beside(worker).await;
    let lasts = world.longer_than_ttl();
    sleep(lasts.saturating_sub(start.elapsed())).await;
    let id = world.fleet.workers[worker].id.clone();
    let former = &world.fleet.former[0];
    if former.leads() {
        found
            .failures
            .push(format!("{id} leads {lasts:?} after it was cut off"));
    }
    former.set_silent(false);
    let heard = Instant::now();
    while !former.is_superseded() {
        if heard.elapsed() > GONE {
            found
                .failures
                .push(format!("{id} does not see that it was replaced"));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    let quiet = Instant::now();
    while quiet.elapsed() < Duration::from_secs(1) {
        if former.leads() {
            found
                .failures
                .push(format!("{id} leads, but another has its id"));
            break;
        }
        sleep(Duration::from_millis(2)).await;
    }
    world.fleet.former.clear();
    world.fleet.changed();
}

/// A worker is restarted and is to lead at once: the process that lives, although the candidacy of
/// its former life is still there, ahead of it.
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
                let handed = Instant::now();
                while !to.is_leader() && handed.elapsed() < GONE {
                    sleep(Duration::from_millis(1)).await;
                }
                let (took, after) = (handed.elapsed(), handed - start);
                found.note(format!(
                    "handed over after {after:.1?}, leads after {took:.1?}"
                ));
                // Of a lease that nobody renews leadership comes with its end only.
                if took > Duration::from_secs(1) {
                    let failure = format!("{} leads {took:.1?} after the transfer", to.id());
                    found.failures.push(failure);
                }
                return;
            }
            // Not in line yet; or behind the former life, which makes way for nobody while its
            // lease lasts.
            Err(ClusterError::TransferRefused { .. } | ClusterError::NotLeader { .. })
                if start.elapsed() < GONE => {}
            Err(error) => {
                let failure = format!("{} to {}: {error}", from.id(), to.id());
                found.failures.push(failure);
                return;
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
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
    // Nobody may renew anything, so by now everybody's local deadline has passed, until the end.
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
    go_on(world, member, led, found).await;
}

/// `led`: it was etcd's leader when it was stopped.
async fn go_on(world: &mut World, member: usize, led: bool, found: &mut Found) {
    if led {
        match world.fleet.renewed_leases(&world.cluster).await {
            Ok(renewed) => found.renewed = renewed,
            Err(error) => found.note(format!("leases before it goes on: {error}")),
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
        Err(wrong) => found.failures.extend(wrong),
    }
    // What it does late is to be counted here, and not with the next fault.
    sleep(LATE.saturating_sub(start.elapsed())).await;
}

async fn cut_off(world: &mut World, worker: usize, found: &mut Found) {
    let lasts = world.longer_than_ttl();
    let start = Instant::now();
    let led = world.fleet.workers[worker].is_leader();
    world.fleet.workers[worker].links.set_silent(true);
    if led {
        // At the latest at its own deadline: the TTL less the margin after the last renewal,
        // which was sent before now.
        while world.fleet.workers[worker].is_leader() && start.elapsed() < lasts {
            sleep(Duration::from_millis(2)).await;
        }
        let ended = start.elapsed();
        found.note(format!("stopped leading after {ended:.2?}"));
        if ended > Duration::from_secs(TTL) {
            let id = &world.fleet.workers[worker].id;
            let failure = format!("{id}, cut off, led for {ended:.2?}, longer than its TTL");
            found.failures.push(failure);
        }
    }
    let left = GONE.saturating_sub(start.elapsed());
    let gone = world
        .fleet
        .until_gone(&world.fleet.workers[worker].id, left)
        .await;
    found.gone(gone.map(|_| start.elapsed()));
    sleep(lasts.saturating_sub(start.elapsed())).await;
    world.fleet.workers[worker].links.set_silent(false);
}

/// The worker crashes, is missed, and starts again.
pub async fn crash(world: &mut World, worker: usize, found: &mut Found) {
    world.fleet.workers[worker].crash();
    world.fleet.changed();
    let id = world.fleet.workers[worker].id.clone();
    found.gone(world.fleet.until_gone(&id, GONE).await);
    world.fleet.workers[worker].start().await;
    world.fleet.changed();
}

/// One discovery is away meanwhile, so that what it missed is compacted when it comes back.
async fn compaction(world: &mut World, found: &mut Found) {
    let result = async {
        let away = &world.fleet.watching[0];
        let seen = away.discovery.nodes().revision();
        away.links.set_silent(true);
        let start = Instant::now();
        let revision = loop {
            // The workers write their metrics every second.
            let revision = world.cluster.status(0).await?.revision;
            if revision > seen + 30 {
                break revision;
            }
            if start.elapsed() > GONE {
                return Err(format!(
                    "etcd is at {revision} after {GONE:?}, as good as {seen}"
                ));
            }
            sleep(Duration::from_millis(10)).await;
        };
        let mut client = world.cluster.client(0);
        answered("compaction", client.compact(revision, None)).await?;
        for member in 0..world.cluster.size() {
            let mut client = world.cluster.client(member);
            answered("defragmentation", client.defragment()).await?;
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
