//! The queue of events.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::units::{RequestId, Seconds};

/// What happens in a simulated world.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    Arrival,
    Finish { server: u32, generation: u64 },
    Timeout { request: RequestId, arrival: u32 },
    Report { server: u32 },
    Deliver,
    Tick { proxy: u32 },
    Neighbour { server: u32 },
    Window,
    Trouble,
    TroubleEnds,
    Warm,
}

struct Scheduled {
    at: Seconds,
    sequence: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.sequence == other.sequence
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at.total_cmp(&other.at)).then(self.sequence.cmp(&other.sequence))
    }
}

/// Events in the order of time; of several at the same time in the order in which they were added.
#[derive(Default)]
pub struct Events {
    queue: BinaryHeap<Reverse<Scheduled>>,
    sequence: u64,
}

impl Events {
    pub fn add(&mut self, at: Seconds, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse(Scheduled {
            at,
            sequence: self.sequence,
            event,
        }));
    }

    /// The next event, and its time.
    pub fn next(&mut self) -> Option<(Seconds, Event)> {
        let Reverse(next) = self.queue.pop()?;
        Some((next.at, next.event))
    }
}
