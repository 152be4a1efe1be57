//! Runs one seed: a world of processes, the faults that are injected, and the conditions that must
//! hold when they are over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use pingora_etcd::store::Backup;
use pingora_etcd::{
    ClusterError, ClusterNode, HealthStatus, Node, NodeState, discovery::DiscoveryStatus,
    worker::SessionState,
};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::check::Counts;
use super::net::NetFaults;
use super::process::{Common, Member, Process, Reader, Sharing};

/// One name is a prefix of the other, because the predecessor confused such groups.
const GROUPS: [&str; 2] = ["app", "app-2"];
/// How long the recovery may take once the faults are over.
const HEALS_WITHIN: Duration = Duration::from_secs(120);
/// How long the recovered state must last.
const STAYS_WELL: Duration = Duration::from_secs(10);
/// The limit of requests per second and user in a quiet time: renewals, metrics, fenced writes, and
/// reads of the leader.
const QUIET_CALLS: f64 = 5.0;
/// How long a command may take to return once the faults are over.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// How long a run may take to return once it is stopped.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// The result of a seed.
pub struct Outcome {
    pub simulated: Duration,
    pub counts: Counts,
    pub violation: Option<String>,
}

/// Runs one seed, entirely on this thread; all random numbers come from the seed.
pub fn run(seed: u64) -> Outcome {
    fastrand::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let (outcome, checker) = runtime.block_on(async {
        let start = Instant::now();
        let mut world = World::new(seed);
        let checker = world.common.checker.clone();
        let result = world.live().await;
        if let Err(text) = result {
            checker.violation(text);
        }
        let outcome = Outcome {
            simulated: start.elapsed(),
            counts: checker.counts(),
            violation: checker.violated(),
        };
        (outcome, checker)
    });
    // The checker and the nodes refer to each other, so without this no world would be freed.
    drop(runtime);
    checker.forget();
    outcome
}

struct World {
    plan: fastrand::Rng,
    common: Common,
    processes: Vec<Arc<Process>>,
    clusters: BTreeMap<String, Sharing>,
    members: Vec<Member>,
    readers: Vec<Reader>,
    backups: Vec<Backup>,
    /// Tasks that end a fault.
    pending: Vec<JoinHandle<()>>,
    /// Tasks that wait for a command.
    commands: Vec<JoinHandle<()>>,
    /// The nodes to be started again: process, group, id, priority.
    down: Vec<(Arc<Process>, &'static str, String, u16)>,
    leaving: Vec<JoinHandle<()>>,
    no_starts_until: Instant,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut plan = fastrand::Rng::with_seed(seed ^ 0x5eed);
        let ttl = plan.choice([2, 3, 5, 10]).unwrap_or(5);
        let extra_ttl = Duration::from_secs(plan.choice([0, 0, 0, 1]).unwrap_or(0));
        let common = Common::new(ttl, extra_ttl);
        let count = plan.usize(3..=6);
        let processes: Vec<_> = (0..count)
            .map(|index| {
                let rate = plan.choice([0.95, 1.0, 1.0, 1.05]).unwrap_or(1.0);
                Process::new(format!("p{index}"), rate)
            })
            .collect();
        Self {
            plan,
            common,
            processes,
            clusters: BTreeMap::new(),
            members: Vec::new(),
            readers: Vec::new(),
            backups: Vec::new(),
            pending: Vec::new(),
            commands: Vec::new(),
            down: Vec::new(),
            leaving: Vec::new(),
            no_starts_until: Instant::now(),
        }
    }

    async fn live(&mut self) -> Result<(), String> {
        self.populate();
        let end = Instant::now() + Duration::from_secs(self.plan.u64(20..90));
        while Instant::now() < end && self.common.checker.violated().is_none() {
            let pause = match self.plan.u8(0..4) {
                0 => self.plan.u64(0..20),
                1 | 2 => self.plan.u64(20..2_000),
                _ => self.plan.u64(2_000..10_000),
            };
            sleep(Duration::from_millis(pause)).await;
            self.inject().await?;
        }
        self.end_faults().await;
        self.wait_until_well().await?;
        self.end().await
    }

    fn populate(&mut self) {
        for index in 0..self.processes.len() {
            let process = self.processes[index].clone();
            // The first two processes are plain workers of one group, so that there is always an
            // election.
            let kind = if index < 2 { 0 } else { self.plan.u8(0..3) };
            if kind == 1 {
                // A process in both groups, with one lease, that also watches both groups.
                let cluster = self.common.cluster(&process);
                for group in GROUPS {
                    self.start(&process, Some(&cluster), group, &format!("{group}:{index}"));
                    let reader = Reader::start(&self.common, &process, Some(&cluster), group);
                    self.readers.push(reader);
                }
                self.clusters.insert(process.name.clone(), cluster);
            } else {
                let group = if index < 2 { GROUPS[0] } else { self.group() };
                self.start(&process, None, group, &format!("{group}:{index}"));
            }
            if kind == 2 || index == 0 {
                let group = self.group();
                let reader = Reader::start(&self.common, &process, None, group);
                self.readers.push(reader);
            }
        }
    }

    fn group(&mut self) -> &'static str {
        self.plan.choice(GROUPS).unwrap_or(GROUPS[0])
    }

    fn start(
        &mut self,
        process: &Arc<Process>,
        sharing: Option<&Sharing>,
        group: &'static str,
        id: &str,
    ) {
        let priority = self.plan.choice([0, 0, 0, 1, 2]).unwrap_or(0);
        let metrics = self.plan.u8(0..4) == 0;
        let member = Member::start(&self.common, process, sharing, group, id, priority, metrics);
        self.members.push(member);
    }

    /// The duration of a fault: short, about that of a lease, or up to 20 s.
    fn fault_duration(&mut self) -> Duration {
        let ttl = self.common.ttl as f64;
        let seconds = match self.plan.u8(0..3) {
            0 => self.plan.f64(),
            1 => ttl * (0.5 + self.plan.f64()),
            _ => 20.0 * self.plan.f64(),
        };
        Duration::from_secs_f64(seconds)
    }

    fn process(&mut self) -> Arc<Process> {
        let index = self.plan.usize(0..self.processes.len());
        self.processes[index].clone()
    }

    /// Injects one fault, or performs one operation.
    async fn inject(&mut self) -> Result<(), String> {
        let lasts = self.fault_duration();
        let what = self.plan.u8(0..32);
        self.common.checker.note(&format!("{what} {lasts:?}"));
        match what {
            0..=5 => {
                let process = self.process();
                let faults = self.random_faults();
                self.set_faults_for(process, faults, lasts);
            }
            6 => {
                // All networks are silent at once: if that lasts, every lease expires.
                for process in self.processes.clone() {
                    let silent = NetFaults {
                        silent: true,
                        ..NetFaults::default()
                    };
                    self.set_faults_for(process, silent, lasts);
                }
            }
            7 | 8 => {
                let process = self.process();
                process.pause();
                self.pending.push(tokio::spawn(async move {
                    sleep(lasts).await;
                    process.resume();
                }));
            }
            9 | 10 => self.crash_one(),
            11 | 12 => self.start_again(),
            13 => {
                if !self.members.is_empty() {
                    let index = self.plan.usize(0..self.members.len());
                    let member = self.members.swap_remove(index);
                    self.remember(&member);
                    let stopping = self.stop_in_time(member);
                    self.leaving.push(stopping);
                }
            }
            14 => self.duplicate(),
            15..=17 => self.command(),
            18 => {
                // The store restarts.
                let outage = self.common.outage(lasts / 4, |common| {
                    common.store.end_watches();
                    common.store.extend_leases();
                });
                self.pending.push(outage);
            }
            19 => self.common.store.extend_leases(),
            20 | 21 => self.compact(),
            22 => self.backups.push(self.common.store.backup()),
            23 => self.crash_a_process(),
            24 => self.restore(),
            25..=27 => drop(self.restart(true, lasts)),
            28 => drop(self.restart(false, lasts)),
            _ => self.transfer_to_a_restarted_one(lasts),
        }
        match self.common.checker.violated() {
            Some(text) => Err(text),
            None => Ok(()),
        }
    }

    fn compact(&mut self) {
        let revision = self.common.store.revision();
        self.common.checker.read_history();
        self.common.store.compact(revision);
        // A process that is disconnected now has missed events that are compacted.
        let process = self.process();
        let refused = NetFaults {
            refused: true,
            ..NetFaults::default()
        };
        self.set_faults_for(process, refused, Duration::from_millis(50));
    }

    fn random_faults(&mut self) -> NetFaults {
        let mut faults = NetFaults::default();
        match self.plan.u8(0..7) {
            0 | 1 => faults.silent = true,
            2 => faults.refused = true,
            3 => faults.lost_requests = self.plan.f64(),
            4 => faults.lost_responses = self.plan.f64(),
            5 => faults.delay = Duration::from_millis(self.plan.u64(10..3_000)),
            _ => faults.late_requests = 0.5 * self.plan.f64(),
        }
        faults
    }

    fn set_faults_for(&mut self, process: Arc<Process>, faults: NetFaults, lasts: Duration) {
        process.net.set(faults);
        self.pending.push(tokio::spawn(async move {
            sleep(lasts).await;
            process.net.set(NetFaults::default());
        }));
    }

    fn remember(&mut self, member: &Member) {
        let down = (
            member.process.clone(),
            member.group,
            member.id.clone(),
            member.priority,
        );
        self.down.push(down);
    }

    fn crash_one(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let index = self.plan.usize(0..self.members.len());
        let member = self.members.swap_remove(index);
        self.remember(&member);
        member.crash();
    }

    /// Crashes everything in a process at once. Its readers are restarted immediately.
    fn crash_a_process(&mut self) {
        let process = self.process();
        let members = std::mem::take(&mut self.members);
        for member in members {
            if Arc::ptr_eq(&member.process, &process) {
                self.remember(&member);
                member.crash();
            } else {
                self.members.push(member);
            }
        }
        if let Some(sharing) = self.clusters.get_mut(&process.name) {
            *sharing = self.common.cluster(&process);
        }
        let sharing = self.clusters.get(&process.name).cloned();
        let readers = std::mem::take(&mut self.readers);
        for reader in readers {
            if Arc::ptr_eq(&reader.process, &process) {
                let group = reader.group;
                reader.crash();
                let again = Reader::start(&self.common, &process, sharing.as_ref(), group);
                self.readers.push(again);
            } else {
                self.readers.push(reader);
            }
        }
    }

    fn start_again(&mut self) {
        if Instant::now() < self.no_starts_until {
            return;
        }
        let Some((process, group, id, _)) = self.down.pop() else {
            return;
        };
        // On the same process, or on another one.
        let process = if self.plan.bool() {
            process
        } else {
            self.process()
        };
        let cluster = self.clusters.get(&process.name).cloned();
        self.start(&process, cluster.as_ref(), group, &id);
    }

    /// Starts a second process with an id that is in use.
    fn duplicate(&mut self) {
        if self.members.is_empty() || Instant::now() < self.no_starts_until {
            return;
        }
        let index = self.plan.usize(0..self.members.len());
        let (group, id) = (self.members[index].group, self.members[index].id.clone());
        let process = self.process();
        self.start(&process, None, group, &id);
    }

    /// Starts a process under the id of one that has crashed or is cut off, long before the lease
    /// of that one expires. Returns the group and the id.
    fn restart(&mut self, leader: bool, lasts: Duration) -> Option<(&'static str, String)> {
        if Instant::now() < self.no_starts_until {
            return None;
        }
        let is_meant = |member: &Member| member.node.is_leader() == leader;
        let meant: Vec<_> = (0..self.members.len())
            .filter(|index| is_meant(&self.members[*index]))
            .collect();
        let index = self.plan.choice(meant)?;
        let member = &self.members[index];
        let (process, group, id) = (member.process.clone(), member.group, member.id.clone());
        if self.plan.bool() {
            self.members.swap_remove(index).crash();
            let cluster = self.clusters.get(&process.name).cloned();
            self.start(&process, cluster.as_ref(), group, &id);
        } else {
            let other = self.process();
            if Arc::ptr_eq(&other, &process) {
                return None;
            }
            let silent = NetFaults {
                silent: true,
                ..NetFaults::default()
            };
            self.set_faults_for(process, silent, lasts);
            self.start(&other, None, group, &id);
        }
        Some((group, id))
    }

    fn transfer_to_a_restarted_one(&mut self, lasts: Duration) {
        let Some((group, id)) = self.restart(false, lasts) else {
            return;
        };
        let leader = self
            .members
            .iter()
            .find(|member| member.group == group && member.node.is_leader());
        if let Some(leader) = leader {
            let (node, drains) = (leader.node.clone(), leader.drains.clone());
            // The new process registers during this wait, or has already.
            let wait = Duration::from_millis(self.plan.u64(0..200));
            self.give(node, drains, 4, id, wait);
        }
    }

    fn command(&mut self) {
        if self.members.is_empty() {
            return;
        }
        let index = self.plan.usize(0..self.members.len());
        let what = self.plan.u8(0..8);
        let group = self.members[index].group;
        let peers: Vec<_> = self
            .members
            .iter()
            .filter(|member| member.group == group)
            .map(|member| member.id.clone())
            .collect();
        let target = self.plan.choice(peers).unwrap_or_default();
        // Most often to the leader, because other nodes refuse.
        let leader = self
            .members
            .iter()
            .position(|member| member.group == group && member.node.is_leader());
        let index = leader.filter(|_| what > 0).unwrap_or(index);
        let node = self.members[index].node.clone();
        let drains = self.members[index].drains.clone();
        if what == 7 {
            // The target leaves at about the same time.
            let leaves = self
                .members
                .iter()
                .position(|member| member.id == target && member.node.id() != node.id());
            if let Some(leaves) = leaves {
                let member = self.members.swap_remove(leaves);
                self.remember(&member);
                let stopping = self.stop_in_time(member);
                self.leaving.push(stopping);
            }
        }
        if what == 1 {
            // The node's requests reach the store long after it has given up on them.
            let process = self.members[index].process.clone();
            let late = NetFaults {
                late_requests: 0.5,
                ..NetFaults::default()
            };
            self.set_faults_for(process, late, Duration::from_millis(100));
        }
        let wait = Duration::from_millis(self.plan.u64(0..8));
        self.give(node, drains, what, target, wait);
    }

    /// Sends a command to a node, after a delay.
    fn give(
        &mut self,
        node: ClusterNode,
        drains: Arc<AtomicBool>,
        what: u8,
        target: String,
        wait: Duration,
    ) {
        let checker = self.common.checker.clone();
        self.commands.push(tokio::spawn(async move {
            sleep(wait).await;
            let term = node.leadership();
            let before = term.as_ref().map(|term| term.epoch);
            let answer = match what {
                0 => node.drain().await,
                1..=3 => node.resign().await,
                _ => node.transfer_to(target.clone()).await,
            };
            if let (Some(term), Ok(())) = (&term, &answer)
                && what > 3
                && target != node.id()
            {
                checker.check_transfer(term, &target);
            }
            let now = node.leadership().map(|term| term.epoch);
            if (1..=3).contains(&what) && answer.is_ok() && before.is_some() && now == before {
                checker.violation(format!("{} still leads after it has resigned", node.id()));
            }
            match &answer {
                Err(ClusterError::NotRunning { .. }) => {
                    if node.session_state() != SessionState::Closed {
                        let text = format!("{} claims not to be running", node.id());
                        checker.violation(text);
                    }
                }
                _ => drains.store(drains.load(Relaxed) || what == 0, Relaxed),
            }
        }));
    }

    /// Replaces the store's data by older data, as after a disaster. If the cluster id changes,
    /// every node that has seen the previous cluster notices. If the revision continues as if
    /// nothing were lost, nobody can notice; and neither can a node that starts just then. So the
    /// store is down until all earlier leases have expired, as it is when a machine is restored,
    /// unless every node can notice.
    fn restore(&mut self) {
        if self.backups.is_empty() {
            return;
        }
        let index = self.plan.usize(0..self.backups.len());
        // Later backups belong to a history that is discarded.
        self.backups.truncate(index + 1);
        let Some(backup) = self.backups.pop() else {
            return;
        };
        let new_cluster = self.plan.bool();
        let lease = Duration::from_secs(self.common.ttl.unsigned_abs()) + self.common.extra_ttl;
        let all_know = self
            .members
            .iter()
            .all(|member| member.node.session_state().is_registered());
        let lasts = match self.plan.u8(0..3) {
            0 if new_cluster && all_know => Duration::from_millis(1),
            1 if new_cluster && all_know => lease.mul_f64(self.plan.f64()),
            _ => lease.mul_f64(1.1),
        };
        self.no_starts_until = Instant::now() + lasts + lease.mul_f64(1.1);
        let outage = self.common.outage(lasts, move |common| {
            let bump = (!new_cluster).then_some(1_000_000);
            common.checker.read_history();
            common.store.restore(&backup, bump);
            let before = if new_cluster {
                0
            } else {
                common.store.revision()
            };
            common.checker.new_history(before);
        });
        self.pending.push(outage);
    }

    fn stop_in_time(&self, member: Member) -> JoinHandle<()> {
        let (process, id) = (member.process.clone(), member.id.clone());
        let running = member.stop();
        let checker = self.common.checker.clone();
        tokio::spawn(async move {
            let mut running = running;
            let mut took = Duration::ZERO;
            let step = Duration::from_millis(10);
            while timeout(step, &mut running).await.is_err() {
                // A paused process cannot end, and its timers start late.
                if process.is_paused() {
                    took = Duration::ZERO;
                } else {
                    took += step;
                }
                if took > SHUTDOWN + step {
                    return checker.violation(format!("{id} has not shut down after {took:?}"));
                }
            }
        })
    }

    /// Ends every fault.
    async fn end_faults(&mut self) {
        for pending in self.pending.drain(..) {
            pending.abort();
            let _ = pending.await;
        }
        self.common.end_outages();
        for process in &self.processes {
            process.net.set(NetFaults::default());
            process.resume();
        }
        for leaving in self.leaving.drain(..) {
            let _ = leaving.await;
        }
        let late = Instant::now() + COMMAND_LIMIT;
        for command in self.commands.drain(..) {
            if timeout_at(late, command).await.is_err() {
                let text = format!("a command has not returned within {COMMAND_LIMIT:?}");
                self.common.checker.violation(text);
            }
        }
    }

    /// Waits until everything is well and stays so for a while, because the effect of the last
    /// fault may appear late.
    async fn wait_until_well(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let mut well_since = None;
        loop {
            if let Some(text) = self.common.checker.violated() {
                return Err(text);
            }
            match self.is_well() {
                Ok(()) => {
                    let calls = self.common.checker.calls();
                    let since = well_since.get_or_insert_with(|| (calls, Instant::now()));
                    if since.1.elapsed() >= STAYS_WELL {
                        let calls = self.common.checker.calls() - since.0;
                        let users = self.members.len() + self.readers.len();
                        let each = calls as f64 / STAYS_WELL.as_secs_f64() / users as f64;
                        if each > QUIET_CALLS {
                            return Err(format!(
                                "{each:.1} requests per second and user although nothing happens"
                            ));
                        }
                        return Ok(());
                    }
                }
                Err(text) => {
                    well_since = None;
                    if start.elapsed() > HEALS_WITHIN {
                        let members = self.describe();
                        return Err(format!(
                            "{HEALS_WITHIN:?} after the last fault: {text}; {members}"
                        ));
                    }
                }
            }
            sleep(Duration::from_millis(250)).await;
        }
    }

    fn describe(&self) -> String {
        let members: Vec<_> = self
            .members
            .iter()
            .map(|member| {
                format!(
                    "{} on {}: {}{}",
                    member.id,
                    member.process.name,
                    member.node.session_state(),
                    if member.node.is_leader() {
                        ", leads"
                    } else {
                        ""
                    }
                )
            })
            .collect();
        let entries: Vec<_> = self
            .common
            .store
            .entries()
            .into_iter()
            .map(|entry| {
                let value = String::from_utf8_lossy(&entry.value).into_owned();
                format!("{}={value} ({:?})", entry.key, entry.lease)
            })
            .collect();
        format!("members {members:?}, entries {entries:#?}")
    }

    fn is_well(&self) -> Result<(), String> {
        let entries = self.common.store.entries();
        let leases = self.common.store.leases();
        self.leases_are_as_many_as_holders(&leases)?;
        for group in GROUPS {
            let prefix = format!("registry/{group}/");
            let registered: BTreeMap<&str, Node> = entries
                .iter()
                .filter_map(|entry| {
                    let id = entry.key.strip_prefix(&prefix)?;
                    let node: Node = serde_json::from_slice(&entry.value).ok()?;
                    let lease = entry.lease.map_or(0, |lease| lease.0);
                    Some((id, node.with_incarnation(lease)))
                })
                .collect();
            let members: Vec<_> = self
                .members
                .iter()
                .filter(|member| member.group == group)
                .collect();
            let ids: BTreeSet<&str> = members.iter().map(|member| &*member.id).collect();
            if !registered.keys().copied().eq(ids.iter().copied()) {
                return Err(format!(
                    "{group}: {:?} are registered, but {ids:?} are running",
                    registered.keys()
                ));
            }
            for id in &ids {
                let own: Vec<_> = members.iter().filter(|member| member.id == *id).collect();
                let mut healthy = own
                    .iter()
                    .filter(|member| member.node.current_health() == HealthStatus::Healthy);
                let (Some(own), None) = (healthy.next(), healthy.next()) else {
                    return Err(format!("not exactly one process with id {id} is healthy"));
                };
                let is_registered = registered[id].state == NodeState::Draining;
                let drains = own.drains.load(Relaxed);
                if drains != is_registered
                    || drains != (own.node.session_state() == SessionState::Draining)
                {
                    return Err(format!(
                        "{id} drains: {drains}, registered as draining: {is_registered}"
                    ));
                }
            }
            self.one_leads(group, &members, &entries)?;
            self.readers_agree(group, &registered)?;
        }
        let requests = entries
            .iter()
            .filter(|entry| entry.key.starts_with("handover/"));
        match requests.count() {
            0 => Ok(()),
            count => Err(format!("{count} transfer requests are left")),
        }
    }

    fn leases_are_as_many_as_holders(
        &self,
        leases: &[pingora_etcd::store::LeaseId],
    ) -> Result<(), String> {
        let mut expected = 0;
        let mut shared: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
        for member in &self.members {
            if member.is_sharing {
                let groups = shared.entry(&member.process.name).or_default();
                *groups.entry(member.group).or_default() += 1;
            } else {
                expected += 1;
            }
        }
        // Nodes of different groups share a lease; nodes of one group cannot.
        for groups in shared.values() {
            expected += groups.values().copied().max().unwrap_or(0);
        }
        // A node that is restarted while others of its cluster keep running gets another lease.
        if leases.len() < expected || leases.len() > expected + 2 * shared.len() {
            return Err(format!(
                "there are {} leases, expected {expected}",
                leases.len()
            ));
        }
        Ok(())
    }

    fn one_leads(
        &self,
        group: &str,
        members: &[&Member],
        entries: &[pingora_etcd::store::Entry],
    ) -> Result<(), String> {
        let healthy = |member: &&&Member| member.node.current_health() == HealthStatus::Healthy;
        let draining = |member: &&&Member| member.node.session_state() == SessionState::Draining;
        let candidates: Vec<_> = members
            .iter()
            .filter(healthy)
            .filter(|member| !draining(member))
            .collect();
        let prefix = format!("election/{group}/");
        let standing = entries
            .iter()
            .filter(|entry| entry.key.starts_with(&prefix))
            .count();
        if standing != candidates.len() {
            return Err(format!(
                "{group}: {standing} candidacies for {} candidates",
                candidates.len()
            ));
        }
        for member in members.iter().filter(healthy) {
            // The node that was told to drain must not lead; a later process under its id may.
            let is_draining = member.node.session_state() == SessionState::Draining;
            if is_draining && member.node.is_leader() {
                return Err(format!("{} leads although it is draining", member.id));
            }
        }
        let leaders: Vec<_> = members
            .iter()
            .filter(|member| member.node.is_leader())
            .collect();
        match (&leaders[..], candidates.is_empty()) {
            ([], true) => Ok(()),
            ([leader], false) => {
                let highest = candidates.iter().map(|member| member.priority).max();
                if Some(leader.priority) < highest {
                    return Err(format!(
                        "{} leads, but a candidate has a higher priority",
                        leader.id
                    ));
                }
                Ok(())
            }
            (leaders, _) => Err(format!("{group}: {} nodes lead", leaders.len())),
        }
    }

    fn readers_agree(&self, group: &str, registered: &BTreeMap<&str, Node>) -> Result<(), String> {
        let incarnations: BTreeMap<String, i64> = registered
            .iter()
            .map(|(id, node)| ((*id).to_owned(), node.incarnation()))
            .collect();
        let leader = self
            .members
            .iter()
            .filter(|member| member.group == group)
            .find_map(|member| Some((member.id.clone(), member.node.leadership()?.epoch)));
        for reader in self.readers.iter().filter(|reader| reader.group == group) {
            let place = &reader.process.name;
            if reader.discovery.status() != DiscoveryStatus::Live {
                return Err(format!("the discovery on {place} is not live"));
            }
            let nodes: BTreeMap<String, i64> = reader
                .discovery
                .nodes()
                .iter()
                .map(|node| (node.id.clone(), node.incarnation()))
                .collect();
            if nodes != incarnations {
                return Err(format!(
                    "the discovery on {place} shows {nodes:?}, but the store has {incarnations:?}"
                ));
            }
            let seen = reader.discovery.leadership();
            let seen = seen.map(|term| (term.node.id.clone(), term.epoch));
            if seen != leader {
                return Err(format!(
                    "the discovery on {place} shows leader {seen:?} instead of {leader:?}"
                ));
            }
            let folded = reader.folded.lock().unwrap();
            if folded.nodes != nodes || folded.leader != seen {
                return Err(format!(
                    "the changes on {place} fold to {folded:?} instead of {nodes:?}, {seen:?}"
                ));
            }
        }
        Ok(())
    }

    /// All nodes leave, with whatever network faults there are, and nothing may be left in the
    /// store.
    async fn end(&mut self) -> Result<(), String> {
        for process in self.processes.clone() {
            let faults = self.random_faults();
            if self.plan.bool() {
                process.net.set(faults);
            }
        }
        sleep(Duration::from_millis(self.plan.u64(0..5_000))).await;
        let members = std::mem::take(&mut self.members);
        for member in members {
            sleep(Duration::from_millis(self.plan.u64(0..300))).await;
            let stopping = self.stop_in_time(member);
            self.leaving.push(stopping);
        }
        for leaving in self.leaving.drain(..) {
            let _ = leaving.await;
        }
        for reader in std::mem::take(&mut self.readers) {
            let stopping = reader.stop();
            if timeout(SHUTDOWN, stopping).await.is_err() {
                return Err("a discovery has not shut down".to_owned());
            }
        }
        for process in &self.processes {
            process.net.set(NetFaults::default());
        }
        self.clusters.clear();
        // Messages in transit arrive, and leases that could not be revoked expire.
        let leftover = Duration::from_secs(self.common.ttl.unsigned_abs() + 20);
        sleep(leftover).await;
        let keys: Vec<_> = self
            .common
            .store
            .entries()
            .into_iter()
            .map(|entry| entry.key)
            .filter(|key| !key.starts_with("work/"))
            .collect();
        let leases = self.common.store.leases();
        if !keys.is_empty() || !leases.is_empty() {
            return Err(format!("left behind: {keys:?}, leases {leases:?}"));
        }
        let tasks = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        if tasks > 0 {
            return Err(format!("{tasks} tasks are left"));
        }
        match self.common.checker.violated() {
            Some(text) => Err(text),
            None => Ok(()),
        }
    }
}
