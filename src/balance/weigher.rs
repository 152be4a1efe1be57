//! From the nodes of a group to their weights: what is shared by everything that routes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;

use super::Policy;
use super::weight::{Headroom, Load, base_weight, mean_load};
use crate::node::Node;

/// A registration: one incarnation of a node at one address. Lives as long as that, across
/// updates and tables, and whatever was learned about it ends with it.
///
/// Shared by everything that routes. What requests hold on to is the [`Live`] part, which has this
/// as its only other owner: so the number of requests in flight is the number of its owners less
/// one, exactly and for one atomic operation at each end of a request instead of two.
#[derive(Debug)]
pub(crate) struct Member {
    live: Arc<Live>,
}

/// What a request holds on to. Only a guard may own one beside its [`Member`].
///
/// An `Arc` puts its counts in front; they are what every request writes. The space at the end
/// keeps them away from the next registration's: on another cache line, and not on the adjacent
/// one, which processors fetch along.
#[derive(Debug)]
pub(super) struct Live {
    addr: SocketAddr,
    /// The bits of an `f64`.
    weight: AtomicU64,
    node: ArcSwap<Node>,
    /// The member is gone: it owns nothing of this any more.
    orphaned: AtomicBool,
    _apart: [u64; 8],
}

impl Live {
    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// As it is now.
    pub(super) fn node(&self) -> Arc<Node> {
        self.node.load_full()
    }

    /// Above 0, whatever the node reports.
    pub(super) fn weight(&self) -> f64 {
        f64::from_bits(self.weight.load(Ordering::Relaxed))
    }
}

/// Requests in flight, as a guard sees it.
pub(super) fn in_flight_of(live: &Arc<Live>) -> u32 {
    let of_member = usize::from(!live.orphaned.load(Ordering::Relaxed));
    Arc::strong_count(live).saturating_sub(of_member) as u32
}

impl Drop for Member {
    fn drop(&mut self) {
        self.live.orphaned.store(true, Ordering::Relaxed);
    }
}

impl Member {
    fn new(node: &Arc<Node>, addr: SocketAddr) -> Self {
        Self {
            live: Arc::new(Live {
                addr,
                weight: AtomicU64::new(1_f64.to_bits()),
                node: ArcSwap::new(node.clone()),
                orphaned: AtomicBool::new(false),
                _apart: [0; 8],
            }),
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.live.addr
    }

    pub(crate) fn node(&self) -> Arc<Node> {
        self.live.node()
    }

    pub(crate) fn is_serving(&self) -> bool {
        self.live.node.load().is_serving()
    }

    pub(crate) fn weight(&self) -> f64 {
        self.live.weight()
    }

    pub(super) fn in_flight(&self) -> u32 {
        (Arc::strong_count(&self.live) - 1) as u32
    }

    /// Counts a request in; dropping the answer counts it out.
    pub(super) fn enter(&self) -> Arc<Live> {
        self.live.clone()
    }

    /// For reading the count without going through the member.
    pub(super) fn counter(&self) -> Counter {
        Counter(Arc::downgrade(&self.live))
    }
}

/// Reads a member's requests in flight with one step less.
#[derive(Debug)]
pub(super) struct Counter(Weak<Live>);

impl Counter {
    pub(super) fn in_flight(&self) -> usize {
        self.0.strong_count().saturating_sub(1)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Registration {
    id: String,
    addr: SocketAddr,
    incarnation: i64,
}

/// What only the updater needs to know of a registration. The place for the adaptive
/// controller's state.
#[derive(Debug)]
struct Known {
    member: Arc<Member>,
    load: Load,
    /// Whether `load` has taken over what the member's node says.
    reported: bool,
}

/// Weighs nodes, and remembers of each registration what a single report does not tell.
#[derive(Debug)]
pub(crate) struct Weigher {
    policy: Policy,
    headroom: Headroom,
    default_port: u16,
    known: HashMap<Registration, Known>,
    refused: u64,
}

impl Weigher {
    pub(crate) fn new(policy: Policy, headroom: Headroom, default_port: u16) -> Self {
        Self {
            policy,
            headroom,
            default_port,
            known: HashMap::new(),
            refused: 0,
        }
    }

    /// Weighs the nodes, draining ones too, and answers with them in their order. Of several
    /// registrations of one address it takes the one written last: that process is there, the
    /// others are leases that have not run out yet. Forgets registrations that are gone.
    pub(crate) fn weigh<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
    ) -> Vec<Arc<Member>> {
        let mut before = std::mem::take(&mut self.known);
        let mut reports = Vec::new();
        let mut at: HashMap<SocketAddr, (usize, u64)> = HashMap::new();
        for node in nodes {
            let addr = node.addr(self.default_port);
            let registration = Registration {
                id: node.id.clone(),
                addr,
                incarnation: node.incarnation(),
            };
            let mut known = before.remove(&registration).unwrap_or_else(|| Known {
                member: Arc::new(Member::new(node, addr)),
                load: Load::default(),
                reported: false,
            });
            // Each report counts once, however often the group changes in the meantime.
            let current = known.member.live.node.load();
            if !known.reported || !Arc::ptr_eq(&current, node) {
                known.reported = true;
                self.refused += u64::from(known.load.observe(node));
                known.member.live.node.store(node.clone());
            }
            let report = (known.member.clone(), base_weight(node), known.load);
            self.known.insert(registration, known);
            match at.entry(addr) {
                Entry::Vacant(vacant) => {
                    vacant.insert((reports.len(), node.last_seen));
                    reports.push(report);
                }
                Entry::Occupied(mut other) if other.get().1 < node.last_seen => {
                    let index = other.get().0;
                    other.get_mut().1 = node.last_seen;
                    reports[index] = report;
                }
                Entry::Occupied(_) => {}
            }
        }
        let serving = reports.iter().filter(|(member, ..)| member.is_serving());
        let mean = mean_load(serving.map(|(_, _, load)| load));
        let weigh = |(member, base, load): (Arc<Member>, f64, Load)| {
            let weight = match self.policy {
                Policy::Headroom => self.headroom.weight(base, &load, &mean),
                Policy::RoundRobin | Policy::Random | Policy::Consistent => base,
            };
            let bits = weight.to_bits();
            member.live.weight.store(bits, Ordering::Relaxed);
            member
        };
        reports.into_iter().map(weigh).collect()
    }

    /// Metrics refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_registrations_of_one_address_the_newer_counts() {
        let node = |id: &str, last_seen| {
            let mut node = Node::new(id, "10.0.0.1".parse().unwrap());
            node.last_seen = last_seen;
            Arc::new(node)
        };
        for nodes in [
            [node("old", 1), node("new", 2)],
            [node("new", 2), node("old", 1)],
        ] {
            let mut weigher = Weigher::new(Policy::Headroom, Headroom::default(), 80);
            let members = weigher.weigh(&nodes);
            assert_eq!(members.len(), 1);
            assert_eq!(members[0].node().id, "new");
        }
    }

    #[test]
    fn a_report_is_counted_once() {
        let bad = serde_json::json!({ "cpu_usage_percent": -1 });
        let node = Arc::new(Node::new("n", "10.0.0.1".parse().unwrap()).with_metadata(bad));
        let mut weigher = Weigher::new(Policy::Headroom, Headroom::default(), 80);
        for _ in 0..3 {
            weigher.weigh([&node]);
        }
        assert_eq!(weigher.refused(), 1);
    }

    #[test]
    fn what_requests_write_is_far_from_the_next_registrations() {
        // With the two counts of the `Arc`: a line and the one fetched along with it.
        assert!(size_of::<Live>() + 2 * size_of::<usize>() >= 128);
    }
}
