//! A capacity that does not depend on the machine: a number of concurrent requests, and a time that
//! each of them takes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

pub struct Slots {
    free: Semaphore,
    count: u32,
    /// The mean service time; service times are exponentially distributed.
    service: Duration,
    state: Mutex<State>,
}

struct State {
    /// The slots in use, by requests and by the neighbour.
    busy: u32,
    taken: u32,
    /// The slots that the neighbour takes as soon as they are free.
    owed: u32,
    waiting: u32,
    /// The slot seconds used since the usage was last read.
    used: f64,
    since: Instant,
    asked: Instant,
}

impl State {
    fn account(&mut self) {
        let now = Instant::now();
        self.used += f64::from(self.busy) * (now - self.since).as_secs_f64();
        self.since = now;
    }
}

impl Slots {
    pub fn new(count: u32, service: Duration) -> Self {
        let now = Instant::now();
        Self {
            free: Semaphore::new(count as usize),
            count,
            service,
            state: Mutex::new(State {
                busy: 0,
                taken: 0,
                owed: 0,
                waiting: 0,
                used: 0.0,
                since: now,
                asked: now,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a slot and holds it for a random service time.
    pub async fn serve(self: &Arc<Self>) {
        let _working = self.enter().await;
        let work = -(1.0 - fastrand::f64()).ln();
        tokio::time::sleep(self.service.mul_f64(work)).await;
    }

    /// Waits for a slot, which is in use until the returned value is dropped.
    pub async fn enter(self: &Arc<Self>) -> Working {
        let waiting = Waiting::new(self);
        if let Ok(permit) = self.free.acquire().await {
            // Returned by `Working`, or kept for the neighbour.
            permit.forget();
        }
        drop(waiting);
        Working::new(self)
    }

    /// The length of a stream. Nine of ten are short, a third of the mean service time; the others take seven
    /// times that time.
    pub fn stream_length(&self) -> Duration {
        let is_long = fastrand::u32(..10) == 0;
        self.service.mul_f64(if is_long { 7.0 } else { 1.0 / 3.0 })
    }

    /// Lets a neighbour take all slots but this many.
    pub fn limit_to(&self, count: u32) -> Result<(), String> {
        if !(1..=self.count).contains(&count) {
            return Err(format!("{count} is out of range, 1 to {}", self.count));
        }
        let mut state = self.state();
        state.account();
        let wanted = self.count - count;
        while state.taken + state.owed > wanted {
            if state.owed > 0 {
                state.owed -= 1;
            } else {
                state.taken -= 1;
                state.busy -= 1;
                self.free.add_permits(1);
            }
        }
        while state.taken + state.owed < wanted {
            match self.free.try_acquire() {
                Ok(permit) => {
                    permit.forget();
                    state.taken += 1;
                    state.busy += 1;
                }
                Err(_) => state.owed += 1,
            }
        }
        Ok(())
    }

    /// The part of all slots that was in use since the last call, from 0 to 1.
    pub fn take_usage(&self) -> f64 {
        let mut state = self.state();
        state.account();
        let passed = (state.since - state.asked).as_secs_f64();
        state.asked = state.since;
        let used = std::mem::take(&mut state.used);
        if passed > 0.0 {
            (used / passed / f64::from(self.count)).clamp(0.0, 1.0)
        } else {
            0.0
        }
    }

    pub fn waiting(&self) -> u32 {
        self.state().waiting
    }
}

/// A request that waits for a slot, until it gets one or is dropped.
struct Waiting<'a>(&'a Slots);

impl<'a> Waiting<'a> {
    fn new(slots: &'a Slots) -> Self {
        slots.state().waiting += 1;
        Self(slots)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state().waiting -= 1;
    }
}

/// A request that uses a slot, until it ends or is dropped.
pub struct Working(Arc<Slots>);

impl Working {
    fn new(slots: &Arc<Slots>) -> Self {
        let mut state = slots.state();
        state.account();
        state.busy += 1;
        drop(state);
        Self(slots.clone())
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.account();
        if state.owed > 0 {
            // From here on the neighbour uses this slot.
            state.owed -= 1;
            state.taken += 1;
        } else {
            state.busy -= 1;
            self.0.free.add_permits(1);
        }
    }
}
