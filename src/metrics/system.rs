//! Metrics of the machine: CPU, memory and load.

use std::sync::Mutex;
use std::time::Instant;

use sysinfo::{
    CpuRefreshKind, MINIMUM_CPU_UPDATE_INTERVAL, MemoryRefreshKind, RefreshKind, System,
};
use tracing::warn;

use super::collector::MetricsCollector;
use crate::metadata::{NodeMetadata, metadata_keys};
use crate::opaque::opaque_debug;
use crate::sync::lock;

/// CPU, memory and load of this machine (feature `system-metrics`).
///
/// In a container these are those of the whole machine: give the load of the process itself, as a
/// [`LoadReporter`](super::LoadReporter) does, or run it by `pingora-etcd register`, which knows the limits of a
/// container.
///
/// Reports `cpu_usage_percent` since the previous call, `memory_usage_percent`,
/// `memory_available_bytes` and `load_avg_1m`. CPU usage is the difference between two readings.
/// [`new`](Self::new) takes the first one, and a call within 200 ms of a reading waits until that
/// time is over, so that the first report is as good as any.
pub struct SystemMetricsCollector {
    state: Mutex<State>,
}

struct State {
    /// `None` on a platform without CPU and memory metrics.
    system: Option<System>,
    read: Instant,
}

impl SystemMetricsCollector {
    /// Takes the first reading.
    pub fn new() -> Self {
        let kinds = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing().with_usage())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(kinds)
            .inspect_err(|error| warn!(%error, "no CPU and memory metrics on this platform"))
            .ok();
        Self {
            state: Mutex::new(State {
                system,
                read: Instant::now(),
            }),
        }
    }
}

impl Default for SystemMetricsCollector {
    fn default() -> Self {
        Self::new()
    }
}

impl MetricsCollector for SystemMetricsCollector {
    fn collect(&self) -> NodeMetadata {
        let mut metrics = serde_json::Map::new();
        let mut state = lock(&self.state);
        let State { system, read } = &mut *state;
        if let Some(system) = system {
            if let Some(rest) = MINIMUM_CPU_UPDATE_INTERVAL.checked_sub(read.elapsed()) {
                std::thread::sleep(rest);
            }
            system.refresh_cpu_usage();
            system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
            *read = Instant::now();
            let cpu = f64::from(system.global_cpu_usage()).clamp(0.0, 100.0);
            metrics.insert(metadata_keys::CPU_USAGE_PERCENT.into(), tenth(cpu).into());
            let (available, total) = (system.available_memory(), system.total_memory());
            if total > 0 {
                let used = total.saturating_sub(available) as f64 / total as f64;
                let key = metadata_keys::MEMORY_USAGE_PERCENT;
                metrics.insert(key.into(), tenth(used * 100.0).into());
                let key = metadata_keys::MEMORY_AVAILABLE_BYTES;
                metrics.insert(key.into(), available.into());
            }
        }
        if let Ok(load) = System::load_average() {
            metrics.insert(metadata_keys::LOAD_AVG_1M.into(), load.one.into());
        }
        NodeMetadata::Object(metrics)
    }
}

/// Rounds to tenths: more digits would be noise, and cost bytes in etcd.
fn tenth(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

opaque_debug!(SystemMetricsCollector);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_contains_the_load() {
        let collector = SystemMetricsCollector::new();
        // Keep one core busy for longer than the minimum interval between readings.
        let start = Instant::now();
        let mut work = 0_u64;
        while start.elapsed() < MINIMUM_CPU_UPDATE_INTERVAL * 2 {
            work = std::hint::black_box(work.wrapping_mul(31).wrapping_add(7));
        }
        let metrics = collector.collect();
        let value = |key: &str| metrics[key].as_f64().unwrap();
        let cpu = value(metadata_keys::CPU_USAGE_PERCENT);
        assert!(cpu > 0.0 && cpu <= 100.0, "{metrics}");
        let memory = value(metadata_keys::MEMORY_USAGE_PERCENT);
        assert!(memory > 0.0 && memory <= 100.0, "{metrics}");
        assert!(value(metadata_keys::MEMORY_AVAILABLE_BYTES) > 0.0);
        assert!(value(metadata_keys::LOAD_AVG_1M) >= 0.0);
    }
}
