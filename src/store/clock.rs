//! The clocks that the life of a lease is measured with.

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

/// A clock that a process measures the life of its leases with.
///
/// The store ends a lease by its own clock, even while this process is suspended. So the clock that
/// the process compares its deadlines with must not stop while it is suspended.
pub trait Clock: fmt::Debug + Send + Sync {
    /// The time since an instant that is fixed for the life of the process. Never goes back.
    fn now(&self) -> Duration;
}

/// The time since the machine's boot, including suspension (`CLOCK_BOOTTIME`), on Linux and Android.
/// Elsewhere the standard library's monotonic clock, which may stop in suspension.
///
/// Costs one call into the vDSO, about 25 ns.
#[derive(Debug, Clone, Copy)]
pub struct BootClock;

impl Clock for BootClock {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // Neither part is negative: the kernel counts from boot.
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
    }

    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    fn now(&self) -> Duration {
        use std::sync::LazyLock;
        static START: LazyLock<std::time::Instant> = LazyLock::new(std::time::Instant::now);
        START.elapsed()
    }
}

/// tokio's clock, which tests can pause. The in-memory store uses it for its leases.
#[derive(Debug, Clone, Copy)]
pub struct TokioClock {
    start: Instant,
}

impl TokioClock {
    /// A clock that starts at zero now.
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Default for TokioClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn the_boot_clock_is_the_kernels_uptime() {
        let uptime = || {
            let text = std::fs::read_to_string("/proc/uptime").unwrap();
            let seconds = text.split(' ').next().unwrap().parse().unwrap();
            Duration::from_secs_f64(seconds)
        };
        // The file has hundredths of a second.
        let slack = Duration::from_millis(20);
        let (before, now, after) = (uptime(), BootClock.now(), uptime());
        assert!(
            now + slack >= before && now <= after + slack,
            "{before:?} {now:?} {after:?}"
        );
    }
}
