//! Where a registration is in the list of all: by its id, and by its address if it holds that.

use std::hash::BuildHasher;
use std::net::SocketAddr;

use hashbrown::HashTable;
use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use super::registration::Registration;

/// Positions of registrations in a list, which every method is given. Four bytes for each key:
/// the keys themselves are in the list.
#[derive(Debug, Default)]
pub(super) struct Index {
    by_id: HashTable<u32>,
    holders: HashTable<u32>,
}

fn hash_id(registration: &Registration) -> u64 {
    xxh3_64(registration.node().id.as_bytes())
}

fn hash_addr(addr: SocketAddr) -> u64 {
    Xxh3DefaultBuilder.hash_one(addr)
}

fn is(position: usize) -> impl Fn(&u32) -> bool {
    move |at| *at as usize == position
}

impl Index {
    pub(super) fn position_of(&self, all: &[Registration], id: &str) -> Option<usize> {
        let hash = xxh3_64(id.as_bytes());
        let is_same = |at: &u32| all[*at as usize].node().id == id;
        let found = self.by_id.find(hash, is_same)?;
        Some(*found as usize)
    }

    /// Adds the id of the registration at this position.
    pub(super) fn insert_id(&mut self, all: &[Registration], at: usize) {
        let hash = |at: &u32| hash_id(&all[*at as usize]);
        self.by_id.insert_unique(hash_id(&all[at]), at as u32, hash);
    }

    pub(super) fn remove_id(&mut self, all: &[Registration], at: usize) {
        if let Ok(found) = self.by_id.find_entry(hash_id(&all[at]), is(at)) {
            found.remove();
        }
    }

    /// The position of the registration that holds this address.
    pub(super) fn holder(&self, all: &[Registration], addr: SocketAddr) -> Option<usize> {
        let is_same = |at: &u32| all[*at as usize].addr() == addr;
        let found = self.holders.find(hash_addr(addr), is_same)?;
        Some(*found as usize)
    }

    /// Makes the registration at this position the holder of its address, which must be free.
    pub(super) fn hold(&mut self, all: &[Registration], at: usize) {
        let hash = |at: &u32| hash_addr(all[*at as usize].addr());
        self.holders
            .insert_unique(hash(&(at as u32)), at as u32, hash);
    }

    pub(super) fn release(&mut self, all: &[Registration], at: usize) {
        if let Ok(found) = self.holders.find_entry(hash_addr(all[at].addr()), is(at)) {
            found.remove();
        }
    }

    /// The registration that was at `from` is now at `to`.
    pub(super) fn moved(&mut self, all: &[Registration], from: usize, to: usize) {
        if let Some(position) = self.by_id.find_mut(hash_id(&all[to]), is(from)) {
            *position = to as u32;
        }
        let hash = hash_addr(all[to].addr());
        if let Some(position) = self.holders.find_mut(hash, is(from)) {
            *position = to as u32;
        }
    }
}
