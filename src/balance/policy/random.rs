//! The policy `random`: at random, by static weights.

use super::routing::{Picked, RoutingPolicy};
use crate::balance::alias::AliasTable;
use crate::balance::fleet::Fleet;
use crate::balance::pick::PickOptions;
use crate::balance::table::Table;
use crate::balance::weight::Share;

#[derive(Debug)]
pub(crate) struct RandomPolicy;

impl RoutingPolicy for RandomPolicy {
    fn index(&self, table: &mut Table, shares: &[Share]) {
        table.alias = AliasTable::new(shares);
    }

    #[inline]
    fn pick(
        &self,
        table: &Table,
        _: &Fleet,
        options: &PickOptions<'_>,
        random: &mut fastrand::Rng,
    ) -> Option<Picked> {
        table.draw(options.exclude, random).map(Picked::from)
    }
}
