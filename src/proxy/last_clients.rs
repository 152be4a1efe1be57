//! What the clients that a backend has answered last got from it.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Who was answered longer ago does not count. Longer than the pauses that backends may ask for by default: nobody is
/// answered in a pause, and who was served before it is not forgotten by then.
const WINDOW: Duration = Duration::from_secs(15);
/// How many answers of a client count. Several may be behind one address, so that the last one does not count alone.
const ANSWERS: u64 = 4;
/// Times are in units of so many milliseconds.
const UNIT: u128 = 64;
/// How many clients are told apart.
const SLOTS: usize = 16;

/// For some of the clients that a backend has answered last, whether it has refused them. A client that is refused often
/// is one client. To note an answer costs one store.
#[derive(Debug)]
pub(super) struct LastClients {
    since: Instant,
    /// Each is for one client of a few, by its address: 0, or the time of its last answer in the upper half, then how many
    /// answers served it, and how many refused it.
    slots: [AtomicU64; SLOTS],
}

/// What a client has got lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Got {
    at: u64,
    served: u64,
    refused: u64,
}

impl Got {
    fn of(slot: u64) -> Self {
        Self {
            at: slot >> 32,
            served: slot >> 16 & 0xffff,
            refused: slot & 0xffff,
        }
    }

    fn slot(self) -> u64 {
        self.at << 32 | self.served << 16 | self.refused
    }
}

impl Default for LastClients {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            slots: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

fn slot_of(client: Option<IpAddr>) -> usize {
    let bits = match client {
        None => 0,
        Some(IpAddr::V4(ip)) => u64::from(u32::from(ip)),
        // Whoever has one address has as many as the rest of them can name.
        Some(IpAddr::V6(ip)) => (u128::from(ip) >> 80) as u64,
    };
    // The upper bits depend on all of them.
    (bits.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 60) as usize % SLOTS
}

impl LastClients {
    /// The time in its unit, from 1 on.
    fn time(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.since).as_millis() / UNIT + 1;
        u64::try_from(elapsed)
            .unwrap_or(u64::MAX)
            .min(u64::from(u32::MAX))
    }

    /// Until when, in the same unit, an answer has been given that does not count any more.
    fn oldest(&self, now: Instant) -> u64 {
        self.time(now)
            .saturating_sub((WINDOW.as_millis() / UNIT) as u64)
    }

    /// The backend has answered this client; `is_refused` says that it did not do what it usually does.
    pub(super) fn note(&self, client: Option<IpAddr>, is_refused: bool, now: Instant) {
        let slot = &self.slots[slot_of(client)];
        let mut got = Got::of(slot.load(Ordering::Relaxed));
        if got.at <= self.oldest(now) {
            (got.served, got.refused) = (0, 0);
        } else if got.served + got.refused >= ANSWERS {
            (got.served, got.refused) = (got.served / 2, got.refused / 2);
        }
        got.at = self.time(now);
        match is_refused {
            true => got.refused += 1,
            false => got.served += 1,
        }
        // Of answers at the same instant one may not be counted.
        slot.store(got.slot(), Ordering::Relaxed);
    }

    /// Whether the backend refuses more clients than it serves.
    pub(super) fn are_mostly_refused(&self, now: Instant) -> bool {
        let oldest = self.oldest(now);
        let (mut refused, mut served) = (0, 0);
        for slot in &self.slots {
            let got = Got::of(slot.load(Ordering::Relaxed));
            if got.at > oldest {
                match got.refused > got.served {
                    true => refused += 1,
                    false => served += 1,
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
        // Nor after the longest pause that it could ask for, in which nobody is answered.
        clients.note(client(1), true, after(11));
        assert!(!clients.are_mostly_refused(after(11)));
        // The other one has gone.
        clients.note(client(1), true, after(16));
        assert!(clients.are_mostly_refused(after(16)));
        // Now it is all.
        for number in 1..100 {
            clients.note(client(number), false, after(60));
        }
        assert!(!clients.are_mostly_refused(after(60)));
        for _ in 0..ANSWERS {
            for number in 1..100 {
                clients.note(client(number), true, after(61));
            }
        }
        assert!(clients.are_mostly_refused(after(61)));
        assert!(!clients.are_mostly_refused(after(77)), "nobody is known");
    }

    #[test]
    fn one_of_those_behind_an_address_is_not_all_of_them() {
        let clients = LastClients::default();
        let now = Instant::now();
        for _ in 0..20 {
            for _ in 0..3 {
                clients.note(client(1), false, now);
            }
            clients.note(client(1), true, now);
            assert!(!clients.are_mostly_refused(now));
        }
        // When all of them are refused, that is soon clear.
        for _ in 0..ANSWERS {
            clients.note(client(1), true, now);
        }
        assert!(clients.are_mostly_refused(now));
    }

    #[test]
    fn clients_of_one_network_are_told_apart() {
        let mut slots: Vec<_> = (0..64).map(|number| slot_of(client(number))).collect();
        slots.sort_unstable();
        slots.dedup();
        assert!(slots.len() > SLOTS / 2, "{slots:?}");
        let of_one = |last: u16| Some(IpAddr::from([0x2001, 0xdb8, 0, last, 0, 0, last, last]));
        assert!((0..64).all(|last| slot_of(of_one(last)) == slot_of(of_one(99))));
    }
}
