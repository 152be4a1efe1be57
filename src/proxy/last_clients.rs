//! What the clients that a backend has answered last got from it.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Who was answered longer ago does not count.
const WINDOW: Duration = Duration::from_secs(5);
/// Times are in units of so many milliseconds.
const UNIT: u128 = 64;
/// How many clients are told apart.
const SLOTS: usize = 16;

/// For some of the clients that a backend has answered last, whether it has refused them. A client that is refused often
/// is one client. To note an answer costs one store.
#[derive(Debug)]
pub(super) struct LastClients {
    since: Instant,
    /// Each is for one client of a few, by its address: 0, or twice the time of its last answer, and 1 more if that was a
    /// refusal.
    slots: [AtomicU32; SLOTS],
}

impl Default for LastClients {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            slots: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

fn slot_of(client: Option<IpAddr>) -> usize {
    let bits = match client {
        None => 0,
        Some(IpAddr::V4(ip)) => u64::from(u32::from(ip)),
        // Whoever has one address has as many as the rest of them can name.
        Some(IpAddr::V6(ip)) => (u128::from(ip) >> 64) as u64,
    };
    // The upper bits depend on all of them.
    (bits.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60) as usize % SLOTS
}

impl LastClients {
    /// The time in its unit, from 1 on.
    fn time(&self, now: Instant) -> u32 {
        let elapsed = now.saturating_duration_since(self.since).as_millis() / UNIT + 1;
        u32::try_from(elapsed).unwrap_or(u32::MAX).min(u32::MAX / 2)
    }

    /// The backend has answered this client; `is_refused` says that it did not do what it usually does.
    pub(super) fn note(&self, client: Option<IpAddr>, is_refused: bool, now: Instant) {
        let stamped = self.time(now) * 2 + u32::from(is_refused);
        self.slots[slot_of(client)].store(stamped, Ordering::Relaxed);
    }

    /// Whether the backend refuses more clients than it serves.
    pub(super) fn are_mostly_refused(&self, now: Instant) -> bool {
        let window = (WINDOW.as_millis() / UNIT) as u32;
        let oldest = self.time(now).saturating_sub(window);
        let (mut refused, mut served) = (0, 0);
        for slot in &self.slots {
            let stamped = slot.load(Ordering::Relaxed);
            if stamped / 2 > oldest || stamped > 0 && oldest == 0 {
                match stamped % 2 {
                    0 => served += 1,
                    _ => refused += 1,
                }
            }
        }
        refused > served
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(number: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, number]))
    }

    #[test]
    fn one_client_that_is_refused_is_not_all() {
        let clients = LastClients::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(!clients.are_mostly_refused(start));
        clients.note(client(1), true, start);
        assert!(clients.are_mostly_refused(start), "there is nobody else");
        // However often it asks.
        clients.note(client(2), false, start);
        for _ in 0..1_000 {
            clients.note(client(1), true, start);
        }
        assert!(!clients.are_mostly_refused(start));
        // The other one has gone.
        clients.note(client(1), true, after(6));
        assert!(clients.are_mostly_refused(after(6)));
        // Now it is all.
        for number in 1..100 {
            clients.note(client(number), false, after(60));
        }
        assert!(!clients.are_mostly_refused(after(60)));
        for number in 1..100 {
            clients.note(client(number), true, after(61));
        }
        assert!(clients.are_mostly_refused(after(61)));
        assert!(!clients.are_mostly_refused(after(67)), "nobody is known");
    }

    #[test]
    fn clients_of_one_network_are_told_apart() {
        let mut slots: Vec<_> = (0..64).map(|number| slot_of(client(number))).collect();
        slots.sort_unstable();
        slots.dedup();
        assert!(slots.len() > SLOTS / 2, "{slots:?}");
        let of_one = |last: u16| Some(IpAddr::from([0x2001, 0xdb8, 0, 7, 0, 0, last, last]));
        assert!((0..64).all(|last| slot_of(of_one(last)) == slot_of(of_one(99))));
    }
}
