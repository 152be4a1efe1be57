//! What a proxy needs of a router.

use std::time::{Duration, Instant};

use pingora_etcd::balance::Upstream;
use pingora_etcd::metrics::LoadReport;

use crate::server::Server;
use crate::view::View;

/// How a request ended.
#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    Succeeded(Duration),
    Failed,
    /// There was no connection.
    Refused,
}

/// A request under way, as its router sees it.
pub struct Ticket {
    pub server: usize,
    pub guard: Option<Upstream>,
}

impl Ticket {
    pub fn to(server: usize) -> Self {
        Self {
            server,
            guard: None,
        }
    }
}

/// How one proxy routes.
pub trait Router {
    fn pick(&mut self, servers: &[Server], rng: &mut fastrand::Rng, now: Instant)
    -> Option<Ticket>;
    /// For a request that these servers have refused; only some routers care.
    fn pick_again(
        &mut self,
        _tried: &[usize],
        servers: &[Server],
        rng: &mut fastrand::Rng,
        now: Instant,
    ) -> Option<Ticket> {
        self.pick(servers, rng, now)
    }
    fn done(&mut self, ticket: Ticket, outcome: Outcome, report: Option<&LoadReport>, now: Instant);
    fn metrics(&mut self, view: &View, now: Instant);
    fn tick(&mut self, now: Instant);
}
