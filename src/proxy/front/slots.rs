//! How many connections there may be, in all and from one client.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// The open connections.
#[derive(Debug, Default)]
pub(super) struct Slots {
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    count: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// One open connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    client: Option<IpAddr>,
}

impl Slots {
    /// Counts a connection; `None` if it is one too many.
    pub(super) fn take(self: &Arc<Self>, most: usize) -> Option<Slot> {
        let mut open = lock(&self.open);
        if most > 0 && open.count >= most {
            return None;
        }
        open.count += 1;
        drop(open);
        Some(Slot {
            slots: self.clone(),
            client: None,
        })
    }

    /// How many connections are open.
    #[cfg(test)]
    fn open(&self) -> usize {
        lock(&self.open).count
    }
}

impl Slot {
    /// Counts the connection as one of this client's; `false` if that is one too many.
    pub(super) fn is_within(&mut self, client: IpAddr, most: usize) -> bool {
        if most == 0 {
            return true;
        }
        let client = network(client);
        let mut open = lock(&self.slots.open);
        let count = open.by_client.entry(client).or_default();
        if *count >= most {
            return false;
        }
        *count += 1;
        self.client = Some(client);
        true
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = lock(&self.slots.open);
        open.count -= 1;
        if let Some(client) = self.client
            && let Some(count) = open.by_client.get_mut(&client)
        {
            *count -= 1;
            if *count == 0 {
                open.by_client.remove(&client);
            }
        }
    }
}

/// What counts as one client: an IPv4 address, or the /64 network that an IPv6 host usually has to
/// itself.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) >> 64 << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn connections_are_limited_in_all_and_per_client() {
        let slots = Arc::<Slots>::default();
        let [mut a, mut b, mut c, mut d] = [(); 4].map(|()| slots.take(4).unwrap());
        assert!(slots.take(4).is_none());
        assert!(a.is_within(ip("10.0.0.1"), 2) && b.is_within(ip("::ffff:10.0.0.1"), 2));
        assert!(!c.is_within(ip("10.0.0.1"), 2));
        // One IPv6 client has a whole network of addresses.
        assert!(c.is_within(ip("2001:db8::1"), 2) && d.is_within(ip("2001:db8::2"), 2));
        drop((c, a));
        let mut e = slots.take(4).unwrap();
        assert!(e.is_within(ip("10.0.0.1"), 2));
        assert_eq!(slots.open(), 3);
        drop((b, d, e));
        assert_eq!(slots.open(), 0);
        assert!(lock(&slots.open).by_client.is_empty());
    }

    #[test]
    fn zero_is_no_limit() {
        let slots = Arc::<Slots>::default();
        let mut taken: Vec<_> = (0..1_000).map(|_| slots.take(0).unwrap()).collect();
        assert!(
            taken
                .iter_mut()
                .all(|slot| slot.is_within(ip("10.0.0.1"), 0))
        );
        assert_eq!(slots.open(), taken.len());
    }
}
