//! What is behind a backend's handle: the registration at an address, and what Pingora sees of it.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;

use crate::balance::{Endpoint, Holder, Share};
use crate::node::Node;

/// Pingora's round robin has a place for each unit of weight, and its consistent hashing 160 points.
const MOST_WEIGHT: f64 = 1_000.0;
/// The same, for all backends together, at least, for each of them, and at most.
const WEIGHT_OF_FEW: usize = 20_000;
const WEIGHT_OF_EACH: usize = 100;
const MOST_WEIGHT_OF_ALL: usize = 1_000_000;
/// By which part a weight may be wrong, so that all backends stay what they are for Pingora.
const MOST_ERROR: f64 = 0.1;
/// Stock selections send so many requests in a row to a backend, at most, because its weight has a divisor that is not used.
const MOST_IN_A_ROW: usize = 10;

/// The registration at an address: the same slot for as long as the address is known, whichever node
/// registers there.
#[derive(Debug)]
pub(super) struct Slot {
    endpoint: ArcSwap<Endpoint>,
    /// It is there, and gets traffic.
    is_used: AtomicBool,
}

impl Slot {
    fn new(endpoint: Arc<Endpoint>, is_used: bool) -> Self {
        Self {
            endpoint: ArcSwap::new(endpoint),
            is_used: AtomicBool::new(is_used),
        }
    }

    pub(super) fn endpoint(&self) -> Arc<Endpoint> {
        self.endpoint.load_full()
    }

    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Relaxed)
    }

    /// Whether it fails, and gets nothing but probes.
    pub(super) fn is_ejected(&self) -> bool {
        self.endpoint.load().is_ejected()
    }

    /// What it gets when the others cannot be used: as much as the others if it is ejected, and nothing if it is not
    /// to be used at all.
    pub(super) fn share_at_last(&self) -> Share {
        match self.is_used() {
            true => self.endpoint.load().share_at_last(),
            false => Share::new(0.0),
        }
    }

    /// Its share of the traffic: 0 from the moment on at which it gets none.
    pub(super) fn share(&self) -> Share {
        match self.is_used() {
            true => self.endpoint.load().share(),
            false => Share::new(0.0),
        }
    }

    /// Returns whether it has started or stopped getting traffic.
    fn set(&self, endpoint: Arc<Endpoint>, is_used: bool) -> bool {
        if !Arc::ptr_eq(&self.endpoint.load(), &endpoint) {
            self.endpoint.store(endpoint);
        }
        self.is_used.swap(is_used, Ordering::Relaxed) != is_used
    }
}

/// The slots of all addresses.
#[derive(Debug)]
pub(super) struct Slots {
    places: HashMap<SocketAddr, Place>,
    /// Slots of addresses that are gone, while some backend still refers to them. An address that
    /// returns before Pingora has discovered again is no change for Pingora, which keeps the backend
    /// it has.
    departed: HashMap<SocketAddr, Weak<Slot>>,
    /// Counts the updates.
    updates: u64,
    /// What Pingora sees is divided by that: its round robin gives each backend as many requests in a row as its
    /// weight is.
    divisor: usize,
}

/// A slot, and what only updates need of it.
#[derive(Debug)]
struct Place {
    slot: Arc<Slot>,
    seen: SeenWeight,
    /// It has been told of that Pingora sees another weight.
    is_told: bool,
    /// The last update that contained it.
    last_update: u64,
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            places: HashMap::new(),
            departed: HashMap::new(),
            updates: 0,
            divisor: 1,
        }
    }
}

impl Slots {
    /// Takes over these backends. Returns whether Pingora has to discover again.
    ///
    /// If a selection follows the weights, those that Pingora sees stay as they are, because another one would
    /// be another backend for Pingora.
    pub(super) fn update(&mut self, holders: Vec<Holder>, is_followed: bool) -> bool {
        self.updates += 1;
        let mut has_changed = false;
        let (count, mut some_are_as_before) = (holders.len(), false);
        for holder in holders {
            let (seen, is_used) = (SeenWeight::of(holder.static_weight), holder.is_used);
            let endpoint = holder.endpoint;
            match self.places.entry(endpoint.addr()) {
                Entry::Occupied(mut place) => {
                    let place = place.get_mut();
                    has_changed |= place.slot.set(endpoint, is_used);
                    some_are_as_before |= place.seen == seen && seen.registered > 0.0;
                    if !is_followed && place.seen != seen {
                        has_changed |= place.seen.weight != seen.weight;
                        place.seen = seen;
                        place.is_told = false;
                    }
                    place.last_update = self.updates;
                }
                Entry::Vacant(vacant) => {
                    has_changed = true;
                    let departed = self.departed.remove(&endpoint.addr());
                    let slot = match departed.and_then(|slot| slot.upgrade()) {
                        Some(slot) => {
                            slot.set(endpoint, is_used);
                            slot
                        }
                        None => Arc::new(Slot::new(endpoint, is_used)),
                    };
                    vacant.insert(Place {
                        slot,
                        seen,
                        is_told: false,
                        last_update: self.updates,
                    });
                }
            }
        }
        if self.places.len() > count {
            has_changed = true;
            let gone = self
                .places
                .extract_if(|_, place| place.last_update < self.updates);
            for (addr, Place { slot, .. }) in gone {
                slot.is_used.store(false, Ordering::Relaxed);
                self.departed.insert(addr, Arc::downgrade(&slot));
            }
        }
        self.departed.retain(|_, slot| slot.strong_count() > 0);
        if !is_followed {
            let divisor = self.fitting_divisor(some_are_as_before);
            has_changed |= std::mem::replace(&mut self.divisor, divisor) != divisor;
        }
        has_changed
    }

    /// The greatest common divisor of the weights, or more where they are too many together. Pingora takes a backend with
    /// another weight for new, so as long as some have kept theirs, the present divisor stays if it fits well enough: all
    /// weights are nearly right. Who gets nothing plays no part.
    fn fitting_divisor(&self, some_are_as_before: bool) -> usize {
        let used = || {
            self.places
                .values()
                .filter(|place| place.seen.registered > 0.0)
        };
        let weights = || used().map(|place| place.seen.weight);
        let common = weights().fold(0, greatest_common_divisor);
        let most = (WEIGHT_OF_EACH * used().count()).clamp(WEIGHT_OF_FEW, MOST_WEIGHT_OF_ALL);
        let least = weights().sum::<usize>().div_ceil(most);
        let error = |weight: usize, divisor: usize| {
            let seen = units(weight, divisor) * divisor;
            seen.abs_diff(weight) as f64 / weight as f64
        };
        // Somewhat more than is needed now, so that one more backend does not need another one.
        let new = match common >= least {
            true => common.max(1),
            false => least + least / 4,
        };
        // What would be as wrong with a new one is no reason for it.
        let fits = weights()
            .all(|it| error(it, self.divisor) <= error(it, new).max(MOST_ERROR / 2.0) * 2.0)
            && self.divisor >= least
            && common / self.divisor < MOST_IN_A_ROW;
        match some_are_as_before && fits {
            true => self.divisor,
            false => new,
        }
    }

    pub(super) fn at(&self, addr: SocketAddr) -> Option<&Arc<Slot>> {
        self.places.get(&addr).map(|place| &place.slot)
    }

    /// Those that are there and get nothing, by drain or because they are down, while others are used; empty if none is.
    pub(super) fn unused_beside_used(&self) -> HashSet<SocketAddr> {
        if !self.places.values().any(|place| place.slot.is_used()) {
            return HashSet::new();
        }
        let unused = self.places.iter();
        let unused = unused.filter(|(_, it)| !it.slot.is_used() && it.seen.registered > 0.0);
        unused.map(|(addr, _)| *addr).collect()
    }

    /// The slots, each with its address and the weight that Pingora sees.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SocketAddr, &Arc<Slot>, usize)> {
        let places = self.places.iter();
        places.map(|(addr, place)| (*addr, &place.slot, units(place.seen.weight, self.divisor)))
    }

    /// Tells once of each node whose weight is not the one that Pingora sees.
    pub(super) fn take_inexact(&mut self, mut tell: impl FnMut(&Node, usize)) {
        for place in self.places.values_mut() {
            let seen = units(place.seen.weight, self.divisor) * self.divisor;
            if place.seen.differs_from(seen) && !std::mem::replace(&mut place.is_told, true) {
                tell(&place.slot.endpoint().node(), seen);
            }
        }
    }
}

/// A registered weight, and what Pingora sees of it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct SeenWeight {
    registered: f64,
    weight: usize,
}

impl SeenWeight {
    fn of(registered: f64) -> Self {
        Self {
            registered,
            weight: registered.round().clamp(1.0, MOST_WEIGHT) as usize,
        }
    }

    /// Whether that differs by more than one in a hundred from what is registered. A node with a weight of 0 is not
    /// enabled, whatever Pingora sees.
    fn differs_from(self, seen: usize) -> bool {
        let difference = (seen as f64 - self.registered).abs();
        self.registered > 0.0 && difference > self.registered / 100.0
    }
}

/// A weight in units of the divisor: the nearest number of them.
fn units(weight: usize, divisor: usize) -> usize {
    ((weight + divisor / 2) / divisor).max(1)
}

fn greatest_common_divisor(one: usize, other: usize) -> usize {
    match other {
        0 => one,
        _ => greatest_common_divisor(other, one % other),
    }
}
