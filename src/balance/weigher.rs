//! From the nodes of a group to their weights: what is shared by everything that routes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::Policy;
use super::table::Hot;
use super::weight::{Headroom, Load, base_weight, mean_load};
use crate::node::Node;

/// One incarnation of a node at one address. Whatever was learned about it ends with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Registration {
    id: String,
    addr: SocketAddr,
    incarnation: i64,
}

/// What is known of a registration. The place for the adaptive controller's state.
#[derive(Debug, Default)]
struct Member {
    hot: Arc<Hot>,
    load: Load,
}

/// Weighs nodes, and remembers of each registration what a single report does not tell.
#[derive(Debug)]
pub(crate) struct Weigher {
    policy: Policy,
    headroom: Headroom,
    default_port: u16,
    members: HashMap<Registration, Member>,
    refused: u64,
}

/// A node with its weight.
#[derive(Debug)]
pub(crate) struct Weighed {
    pub(crate) node: Arc<Node>,
    pub(crate) addr: SocketAddr,
    /// Above 0, whatever the node reports.
    pub(crate) weight: f64,
    pub(super) hot: Arc<Hot>,
}

impl Weigher {
    pub(crate) fn new(policy: Policy, headroom: Headroom, default_port: u16) -> Self {
        Self {
            policy,
            headroom,
            default_port,
            members: HashMap::new(),
            refused: 0,
        }
    }

    /// Weighs every node, draining ones too. Forgets registrations that are gone.
    pub(crate) fn weigh<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a Arc<Node>>,
    ) -> Vec<Weighed> {
        let mut before = std::mem::take(&mut self.members);
        let mut reports = Vec::new();
        for node in nodes {
            let addr = node.addr(self.default_port);
            let registration = Registration {
                id: node.id.clone(),
                addr,
                incarnation: node.incarnation(),
            };
            let mut member = before.remove(&registration).unwrap_or_default();
            self.refused += u64::from(member.load.observe(node));
            reports.push((node, addr, member.hot.clone(), member.load));
            self.members.insert(registration, member);
        }
        let serving = reports.iter().filter(|(node, ..)| node.is_serving());
        let mean = mean_load(serving.map(|(_, _, _, load)| load));
        let weigh = |(node, addr, hot, load): (&Arc<Node>, _, _, _)| Weighed {
            weight: match self.policy {
                Policy::Headroom => self.headroom.weight(base_weight(node), &load, &mean),
                Policy::RoundRobin | Policy::Random | Policy::Consistent => base_weight(node),
            },
            node: node.clone(),
            addr,
            hot,
        };
        reports.into_iter().map(weigh).collect()
    }

    /// Metrics refused so far.
    pub(crate) fn refused(&self) -> u64 {
        self.refused
    }
}
