//! The policy `round_robin`: one after the other, evenly spread by static weights.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::routing::{Picked, RoutingPolicy};
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::spread::{GOLDEN, Spread};
use crate::balance::table::{MAX_REDRAWS, Table};
use crate::balance::weight::Share;

#[derive(Debug)]
pub(crate) struct RoundRobinPolicy {
    turn: AtomicUsize,
}

impl RoundRobinPolicy {
    /// Begins anywhere: otherwise the first requests of all processes would go to the same backend.
    pub(super) fn new() -> Self {
        Self {
            turn: AtomicUsize::new(fastrand::u32(..) as usize),
        }
    }

    /// Goes on where the one before has ended.
    pub(super) fn continue_from(&mut self, former: &Self) {
        self.turn = AtomicUsize::new(former.turn.load(Ordering::Relaxed));
    }
}

impl RoutingPolicy for RoundRobinPolicy {
    fn index(&self, table: &mut Table, shares: &[Share]) {
        let all_equal = shares.windows(2).all(|pair| pair[0] == pair[1]);
        table.spread = (!all_equal).then(|| Spread::new(shares));
    }

    #[inline]
    fn pick(
        &self,
        table: &Table,
        _: &Fleet,
        options: &PickOptions<'_>,
        _: &mut fastrand::Rng,
    ) -> Option<Picked> {
        let tries = table.slots.len().min(MAX_REDRAWS);
        for _ in 0..tries {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            let index = match &table.spread {
                None => turn % table.slots.len(),
                Some(spread) => spread.turn(turn as u64),
            };
            if !table.is_excluded(index, options.exclude) {
                return Some(Picked::from(index));
            }
        }
        let turn = self.turn.load(Ordering::Relaxed) as u64;
        let other = table.draw_other_than(options.exclude, turn.wrapping_mul(GOLDEN));
        other.map(Picked::from)
    }
}
