//! A live view of the cluster behind [Pingora](https://docs.rs/pingora).
//!
//! Worker processes register in etcd, elect a leader per group, and publish their CPU, memory and
//! queue depth. Balancer processes watch the group, turn those metrics into weights, and route
//! every request with them, without polling and without a lock on the request path.
//!
//! # Three ways in
//!
//! - **Drop in.** A Pingora proxy that has a `LoadBalancer` swaps its discovery for
//!   `pingora::ClusterBackends` and its selection for
//!   `pingora::MetricsWeighted`, or takes
//!   `pingora::LiveLoadBalancer`, which changes reach at once.
//! - **Bundled.** `pingora::ClusterProxy` is a complete proxy; the example
//!   `load_balancer` runs it from one YAML file.
//! - **The core alone.** [`ClusterNode`] and [`ServiceDiscovery`] without Pingora
//!   (`default-features = false`), for workers and for programs that only need membership or a
//!   leader.
//!
//! # A worker
//!
//! ```no_run
//! use pingora_etcd::ClusterNodeBuilder;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = ClusterNodeBuilder::new(
//!     vec!["http://10.0.0.1:2379".to_string()],
//!     "worker-1",
//!     "10.0.1.1".parse()?,
//!     "my-service",
//! )
//! .port(8080)
//! .try_build()?;
//! // Registers, campaigns and publishes until Ctrl-C; then leaves.
//! node.run_until(async { _ = tokio::signal::ctrl_c().await }).await?;
//! # Ok(()) }
//! ```
//!
//! # How it works
//!
//! - **A lease** holds the node's entry and its candidacy: one per node, or one for all nodes of a
//!   process in a [`Cluster`]. One that is lost for any reason is replaced by another, for ever. What
//!   a node knows of it is a state machine without I/O, [`SessionState`].
//! - **The election** is etcd's own recipe: the candidate with the least create revision leads,
//!   each other one watches the one ahead of it. That revision is the term's *fencing token*
//!   ([`Leadership::epoch`]), greater with every term.
//! - **Leadership ends by the clock.** [`ClusterNode::is_leader`] compares it with a local
//!   deadline on each call: the instant the last answered renewal was sent, plus the TTL, less a
//!   margin. A leader that is cut off stops before its lease can pass to another, without anybody
//!   telling it. For etcd the clock is that of the time since boot, which goes on in suspend.
//! - **Nothing is claimed from the answer to a write**, which can be lost, nor from an answer that was
//!   on its way when the deadline passed: only from what was read after.
//! - **Discovery** lists a group at one revision and watches it from the next one, in one stream.
//!   After a disconnect it resumes where it stopped; if history is gone by then it lists again and
//!   tells the difference. The last view stays in use for as long as etcd is away.
//! - **Weights live beside the backends.** An update of metrics never touches a backend's
//!   identity, so it forgets nobody's health.
//! - **Weights follow what is seen**, by default ([`balance::Adaptive`]): two integral controllers,
//!   one on what backends report, one on the latencies of this process's own requests, and a gate on
//!   failures. [`balance`] does it without I/O, with time and randomness from outside.
//! - **The pick** draws a few backends by weight and takes the least busy for its weight. It takes
//!   no lock and allocates nothing.
//!
//! # Fencing
//!
//! "At most one node says that it leads" is about the instant of asking. A process can be stopped
//! between asking and acting: by the scheduler, a page fault, a hypervisor. When it goes on, another
//! node may lead, and no check of its own can be late enough. So what must not be done by two leaders
//! has to be refused *where it takes effect*:
//!
//! - In the same etcd, by a condition: [`Leadership::guard`] holds for as long as the term does. A
//!   transaction with it is carried out in this term or not at all.
//! - In any other system, by a token: [`Leadership::epoch`] grows with every term. The system
//!   remembers the greatest one it has seen, and refuses requests with a smaller one.
//!
//! ```
//! # use std::sync::atomic::{AtomicI64, Ordering::AcqRel};
//! use pingora_etcd::store::{MemoryStore, Store, Txn};
//! use pingora_etcd::{ClusterError, ClusterNode};
//!
//! /// Work for a leader, on the etcd that holds the election.
//! async fn next_job(node: &ClusterNode, store: &dyn Store) -> Result<(), ClusterError> {
//!     let Some(term) = node.leadership() else { return Ok(()) };
//!     let write = Txn::new().when(term.guard()).put("jobs/next", b"42".to_vec(), None);
//!     match store.txn(write).await? {
//!         Some(revision) => println!("done in revision {revision}"),
//!         None => println!("the term was over"),
//!     }
//!     Ok(())
//! }
//!
//! /// A system that is told tokens, such as a queue, a database, or `leader_routing`'s workers.
//! struct Fenced { greatest: AtomicI64 }
//!
//! impl Fenced {
//!     fn accepts(&self, token: i64) -> bool {
//!         self.greatest.fetch_max(token, AcqRel) <= token
//!     }
//! }
//! # let fenced = Fenced { greatest: AtomicI64::new(0) };
//! # assert!(fenced.accepts(3) && fenced.accepts(3) && !fenced.accepts(2));
//! # let _ = (next_job, MemoryStore::new());
//! ```
//!
//! # Several leaders in line
//!
//! Candidates queue in the order in which they came. [`ClusterNode::transfer_to`] lets the leader
//! choose; [`ClusterNodeBuilder::priority`] lets a candidate take over from one with less. Either
//! way a request under `handover/{group}/` asks those ahead of the target to queue again behind it,
//! and the leader goes when nobody else is ahead, on the condition that the target is there: one
//! change of leader, and a few milliseconds without one. Nodes of `photon-etcd-cluster` know nothing
//! of this: leadership is not taken past them. Where etcd has users, this needs rights of its own
//! (README, "TLS and passwords").
//!
//! # Scale
//!
//! A balancer's own cost grows with what changes, not with the group: about 7 us of CPU for a change at
//! 10,000 nodes and 8 us at 100,000, and 1,200 bytes for a node (`make bench-scale`). What grows is what
//! etcd has to send: every write to every balancer.
//!
//! `make bench-fleets` simulates what workers write, and measures what an etcd pays for it. With a sample
//! every 5 s a node whose CPU wanders by several points writes 0.19 times a second without a deadband, 0.09
//! times with it, and 0.03 times when it is quiet; the busiest second of a thousand nodes was 1.2 to 1.4
//! times the mean, and six times for quiet ones, which started together. Etcd 3.5.16 took 450 us of CPU
//! for a write (one after the other, without waiting for the disk), 14 us for each watcher that it told, in
//! 273 bytes, and 50 us for the renewal of a lease (in another run 430, 16 and 135: two noisy cores). With
//! leases of 5 s that comes to:
//!
//! | nodes | balancers | metrics | writes/s | events/s | MB/s | cores of etcd |
//! |---|---|---|---|---|---|---|
//! | 1,000 | 10 | every sample | 200 | 2,000 | 0.5 | 0.15 |
//! | 1,000 | 10 | deadband | 95 | 950 | 0.3 | 0.09 |
//! | 1,000 | 100 | every sample | 200 | 20,000 | 5.5 | 0.4 |
//! | 1,000 | 100 | deadband | 95 | 9,500 | 2.6 | 0.2 |
//! | 1,000 | 1,000 | every sample | 200 | 200,000 | 55 | 2.9 |
//! | 1,000 | 1,000 | deadband | 95 | 95,000 | 26 | 1.4 |
//! | 1,000 | any | in responses | 0 | 0 | 0 | 0.03 |
//! | 10,000 | 10 | every sample | 2,000 | 20,000 | 5.5 | 1.5 |
//! | 10,000 | 10 | deadband | 950 | 9,500 | 2.6 | 0.9 |
//! | 10,000 | 100 | every sample | 2,000 | 200,000 | 55 | 4.0 |
//! | 10,000 | 100 | deadband | 950 | 95,000 | 26 | 2.1 |
//! | 10,000 | 1,000 | every sample | 2,000 | 2,000,000 | 546 | 29 |
//! | 10,000 | 1,000 | deadband | 950 | 950,000 | 260 | 14 |
//! | 10,000 | any | in responses | 0 | 0 | 0 | 0.3 |
//! | 100,000 | 10 | every sample | 20,000 | 200,000 | 55 | 15 |
//! | 100,000 | 10 | deadband | 9,500 | 95,000 | 26 | 8.6 |
//! | 100,000 | 100 | every sample | 20,000 | 2,000,000 | 546 | 40 |
//! | 100,000 | 100 | deadband | 9,500 | 950,000 | 260 | 21 |
//! | 100,000 | 1,000 | every sample | 20,000 | 20,000,000 | 5,460 | 294 |
//! | 100,000 | 1,000 | deadband | 9,500 | 9,500,000 | 2,600 | 142 |
//! | 100,000 | any | in responses | 0 | 0 | 0 | 3 |
//!
//! (Quiet nodes cost a third of those with the deadband. Watchers spread over the members of a cluster,
//! writes and renewals do not.) A balancer that is told 950 events a second spends 0.8 % of a core on them,
//! one that is told 20,000 a fifth.
//!
//! One etcd ends where a member's cores do: with eight, at about 10,000 nodes and 500 balancers that all watch,
//! or 100,000 nodes and ten; and where it may write to disk no more, for most at some ten thousand small
//! writes a second. Before that:
//!
//! - **Coarser metrics.** A longer interval, a wider [`Deadband`]; or none in etcd, but with the responses
//!   ([`LoadReport`], `load_reports: true`), which are fresher and cost etcd nothing: what is left is who is
//!   there. `adaptive` needs neither to route around what is slow or fails.
//! - **Longer leases.** Renewals go with a third of the TTL: at 100,000 nodes they alone are three cores at
//!   5 s, one at 15 s.
//! - **[Filters](NodeFilter) do not help etcd**, only the balancer: etcd sends a group whole. Smaller groups do,
//!   one for each service or zone, each with its own key range.
//! - **`etcd grpc-proxy`** between balancers and etcd: it watches once for many that watch the same range. It
//!   numbers watches by itself and answers no progress requests, so they are opened one at a time, and anew
//!   every few quiet seconds. Tried with 3.5.16's and 3.5.30's, through a restart and a compaction: changes
//!   come as soon as without it. It may confirm a watch while etcd itself is away, which is then noticed by
//!   the next call only. Give it `--advertise-client-url`: 3.5.30's ends by itself without.
//! - **Several etcd clusters**, each with its groups: a process may have a [`Cluster`] for each.
//!
//! # What it does not do
//!
//! - The local deadline trusts the machine's clock to run at the right *rate*, within the margin.
//!   Where there is no boot-time clock (elsewhere than on Linux), a machine that was suspended may
//!   believe in its term until the first renewal. Fence.
//! - It trusts the store not to end a lease before its time. If somebody revokes a leader's lease by
//!   hand, or etcd does by mistake, the term ends when the leader hears of it: by its watch, or at its
//!   next renewal. Fence.
//! - Data that is restored ends leases too, and takes tokens back. A node that has seen the former
//!   history queues anew and claims nothing until its own TTL is over, so let the members of a group
//!   have one TTL. One that starts just then has seen nothing: restore with all members down for
//!   longer than the TTL, by `etcdctl snapshot restore`, with `--bump-revision` if tokens are used
//!   outside of etcd. A disk that is rolled back under the same cluster id is noticed only by those
//!   that have seen more than is on it.
//! - [`EtcdOptions::memory`] is a store for one process, for tests and demos. It keeps nothing.
//! - etcd looks at a user's token and roles when a request or a watch is made, not while a watch is
//!   open: a right that is taken away ends with the connection.
//! - Whoever may write to etcd can point traffic anywhere, and say of any address that it is theirs. Say
//!   where traffic may go ([`ServiceDiscoveryBuilder::allowed_networks`]), and give a worker no more
//!   rights than its own key (README, "TLS and passwords").
//! - Self-preservation ([`SelfPreservation`]) is for groups: of one or two nodes each is gone with its
//!   lease.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `pingora` | yes | the module `pingora`, the adapters |
//! | `system-metrics` | no | `SystemMetricsCollector` |
//! | `tls` | no | `https://` endpoints and [`TlsOptions`], by rustls with ring |
//! | `tower` | no | `LoadReporter::layer`: counts requests and reports load with every response |
//! | `test-util` | no | controls of the in-memory store: compaction, expiry, refusal, silence |
#![forbid(unsafe_code)]
#![deny(missing_docs, unreachable_pub)]

mod backoff;
pub mod balance;
#[cfg(any(test, feature = "test-util"))]
#[doc(hidden)]
pub mod bugs;
#[cfg(not(any(test, feature = "test-util")))]
#[allow(unreachable_pub, dead_code, reason = "its names are the simulation's")]
mod bugs;
mod cluster;
pub mod config;
pub mod discovery;
pub mod error;
mod ids;
mod keys;
mod lifecycle;
mod load_report;
mod metadata;
pub mod metrics;
mod node;
#[cfg(feature = "pingora")]
pub mod pingora;
#[cfg(feature = "pingora")]
pub mod proxy;
mod signal;
pub mod store;
mod supervise;
mod sync;
#[cfg(test)]
mod testing;
mod validate;
mod view;
pub mod worker;

pub use cluster::{Cluster, ClusterBuilder};
pub use discovery::{ServiceDiscovery, ServiceDiscoveryBuilder};
pub use error::ClusterError;
pub use metadata::{Metadata, NodeMetadata, metadata_keys};
pub use metrics::MetricsCollector;
#[cfg(feature = "system-metrics")]
pub use metrics::SystemMetricsCollector;
pub use node::{HealthStatus, Node, NodeState};
pub use store::EtcdOptions;
pub use view::{Change, ClusterEvent, Leadership, Nodes};
pub use worker::{ClusterNode, ClusterNodeBuilder};

// Names and modules of `photon-etcd-cluster`, for programs that come from there.
#[doc(hidden)]
pub use metrics::{CompositeMetricsCollector, NoopMetricsCollector};

#[doc(hidden)]
pub mod cluster_node {
    pub use crate::worker::{ClusterNode, ClusterNodeBuilder};
}

#[doc(hidden)]
pub mod event {
    pub use crate::view::ClusterEvent;
}

#[doc(hidden)]
pub mod types {
    pub use crate::metadata::{NodeMetadata, metadata_keys};
    pub use crate::node::{HealthStatus, Node};
}

/// The README's code is compiled with the doc tests.
#[cfg(all(doctest, feature = "pingora", feature = "system-metrics"))]
#[doc = include_str!("../README.md")]
struct Readme;
