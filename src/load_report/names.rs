//! Under which names servers report what routing uses.

use crate::error::ClusterError;

/// Under which names backends report their load, where that is not under those of [`LoadReport`]: what
/// stands here is read instead. A name is that of a named metric, with or without `named_metrics.` before
/// it, or `utilization.` and a name.
///
/// ```
/// use pingora_etcd::metrics::{LoadReport, MetricNames};
/// // As vLLM reports with `endpoint-load-metrics-format: TEXT`.
/// let mut names = MetricNames::default();
/// names.queue_depth = Some("num_requests_waiting".to_owned());
/// names.mem_utilization = Some("kv_cache_usage_perc".to_owned());
/// let text = "TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=7.0";
/// let report = LoadReport::parse_with(text, &names).unwrap();
/// assert_eq!((report.queue, report.memory), (Some(7.0), Some(0.4)));
/// ```
///
/// [`LoadReport`]: crate::metrics::LoadReport
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MetricNames {
    /// What is read for `cpu_utilization`: a fraction, from 0 to 1.
    pub cpu_utilization: Option<String>,
    /// What is read for `mem_utilization`: a fraction, from 0 to 1.
    pub mem_utilization: Option<String>,
    /// What is read for `named_metrics.queue_depth`: the number of requests that wait.
    pub queue_depth: Option<String>,
    /// What is read for `named_metrics.in_flight`: the number of requests in progress.
    pub in_flight: Option<String>,
}

/// Where a value stands in a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A field of the format.
    Field,
    /// In `named_metrics`.
    Named,
    /// In `utilization`.
    Utilization,
}

impl Place {
    /// The place and the name in it that a name in the text form means.
    pub(super) fn of(name: &str) -> (Self, &str) {
        if let Some(name) = name.strip_prefix("named_metrics.") {
            (Self::Named, name)
        } else if let Some(name) = name.strip_prefix("utilization.") {
            (Self::Utilization, name)
        } else {
            (Self::Field, name)
        }
    }
}

/// What routing makes of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    Cpu,
    Memory,
    Application,
    Queue,
    InFlight,
    SampledAt,
    Rps,
    Eps,
}

impl MetricNames {
    /// What the value with this name means; `None` for one that is not used.
    pub(super) fn meaning(&self, place: Place, name: &str) -> Option<Meaning> {
        let given = [
            (&self.cpu_utilization, Meaning::Cpu),
            (&self.mem_utilization, Meaning::Memory),
            (&self.queue_depth, Meaning::Queue),
            (&self.in_flight, Meaning::InFlight),
        ];
        let is_given = |given: &Option<String>| {
            given.as_deref().is_some_and(|given| {
                let (given_place, given) = match Place::of(given) {
                    (Place::Field, name) => (Place::Named, name),
                    other => other,
                };
                given_place == place && given == name
            })
        };
        if let Some((_, meaning)) = given.iter().find(|(given, _)| is_given(given)) {
            return Some(*meaning);
        }
        let usual = match (place, name) {
            (Place::Field, "cpu_utilization" | "cpuUtilization") => Meaning::Cpu,
            (Place::Field, "mem_utilization" | "memUtilization") => Meaning::Memory,
            (Place::Field, "application_utilization" | "applicationUtilization") => {
                Meaning::Application
            }
            (Place::Field, "rps_fractional" | "rpsFractional") => Meaning::Rps,
            (Place::Field, "eps") => Meaning::Eps,
            (Place::Named, "queue_depth") => Meaning::Queue,
            (Place::Named, "in_flight") => Meaning::InFlight,
            (Place::Named, "sampled_at") => Meaning::SampledAt,
            _ => return None,
        };
        let is_replaced = given
            .iter()
            .any(|(given, meaning)| given.is_some() && *meaning == usual);
        (!is_replaced).then_some(usual)
    }

    /// Checks that each name can be one.
    ///
    /// # Errors
    ///
    /// [`ClusterError::InvalidConfig`] for an empty name or one that no report can contain, with `section` and the
    /// field.
    pub fn validate(&self, section: &str) -> Result<(), ClusterError> {
        let all = [
            ("cpu_utilization", &self.cpu_utilization),
            ("mem_utilization", &self.mem_utilization),
            ("queue_depth", &self.queue_depth),
            ("in_flight", &self.in_flight),
        ];
        for (field, name) in all {
            let Some(name) = name else { continue };
            let (_, bare) = Place::of(name);
            if bare.is_empty() || bare.contains([',', '=', ':', ' ']) {
                let reason = format!("{name:?} cannot be the name of a metric in a load report");
                return Err(ClusterError::config(format!("{section}.{field}"), reason));
            }
        }
        Ok(())
    }
}
