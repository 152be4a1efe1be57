//! Keeping a balancer up to date.

use std::convert::Infallible;
use std::time::Instant;

use tokio::time::{Instant as TokioInstant, sleep_until};

use super::Balancer;
use super::balancer::TICK;
use super::pace::{every_tick, pause_after};
use crate::view::Source;

impl Balancer {
    /// Gives this balancer the nodes of a source for as long as the future is polled: applies changes as they come,
    /// publishes them, and calls [`tick`](Self::tick) when it is due. With it a balancer can be fed from anything; for
    /// a group in etcd, `pingora::BalancerService` does this and more.
    ///
    /// The first change takes effect at once, the next ones together, at least 20 ms apart, so that this costs at most
    /// 2 % of a core.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use pingora_etcd::{Change, Node, Source, balance::Balancer};
    ///
    /// /// A list that never changes.
    /// struct Fixed(Option<Vec<Node>>);
    ///
    /// impl Source for Fixed {
    ///     async fn next(&mut self) -> Change {
    ///         match self.0.take() {
    ///             Some(nodes) => Change::all(nodes),
    ///             None => std::future::pending().await,
    ///         }
    ///     }
    /// }
    ///
    /// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
    /// let balancer = Arc::new(Balancer::builder().try_build()?);
    /// let node = Node::new("a", "10.0.0.1".parse().unwrap()).with_port(8080);
    /// let followed = balancer.clone();
    /// tokio::spawn(async move { followed.follow(Fixed(Some(vec![node]))).await });
    /// while balancer.is_empty() {
    ///     tokio::task::yield_now().await;
    /// }
    /// assert_eq!(balancer.pick().unwrap().addr().to_string(), "10.0.0.1:8080");
    /// # Ok::<(), pingora_etcd::ClusterError>(()) }).unwrap();
    /// ```
    pub async fn follow(&self, source: impl Source) -> Infallible {
        tokio::select! {
            never = self.apply_changes(source) => never,
            never = every_tick(|now| self.tick(now)) => never,
        }
    }

    /// The same without ticks.
    pub(crate) async fn apply_changes(&self, mut source: impl Source) -> Infallible {
        let mut due = TokioInstant::now();
        let mut is_published = true;
        loop {
            let is_due = !is_published && due <= TokioInstant::now();
            tokio::select! {
                biased;
                // A source that has one change after the other does not keep those that are due waiting.
                () = std::future::ready(()), if is_due => {}
                // All changes that are there already are published together.
                change = source.next() => {
                    self.apply(&change, Instant::now());
                    is_published = false;
                    // Nor does it keep the thread for itself.
                    tokio::task::consume_budget().await;
                    continue;
                }
                () = sleep_until(due), if !is_published => {}
            }
            let start = Instant::now();
            self.publish(start);
            is_published = true;
            due = TokioInstant::now() + pause_after(start.elapsed()).min(TICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Node;
    use crate::view::Change;

    /// It has a change whenever it is asked.
    struct Busy;

    impl Source for Busy {
        async fn next(&mut self) -> Change {
            Change::all([Node::new("a", [10, 0, 0, 1].into())])
        }
    }

    #[tokio::test]
    async fn a_source_that_never_waits_keeps_nobody_waiting() {
        let balancer = Balancer::builder().try_build().unwrap();
        let is_there = async {
            while balancer.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            never = balancer.follow(Busy) => match never {},
            () = is_there => {}
        }
        assert_eq!(balancer.len(), 1);
    }
}
