//! What the `groups` and `routes` of a file come to, together.

use std::collections::BTreeMap;

use super::cluster::ClusterConfig;
use super::group::{DEFAULT_GROUP, Group};
use super::values::is_token;
use crate::error::ClusterError;

impl ClusterConfig {
    /// The same section as it would be if it described this one of its groups; `None` for a name that is
    /// not among them. [`DEFAULT_GROUP`](super::DEFAULT_GROUP) is the group of the section itself.
    pub fn of_group(&self, name: &str) -> Option<Self> {
        match self.groups.get(name) {
            Some(group) => Some(self.with(group, name)),
            None if name == DEFAULT_GROUP => Some(Self {
                groups: BTreeMap::new(),
                routes: Vec::new(),
                ..self.clone()
            }),
            None => None,
        }
    }

    fn with(&self, group: &Group, name: &str) -> Self {
        let mut config = self.clone();
        macro_rules! replace {
            ($($field:ident),*) => {
                $(if let Some(value) = &group.$field {
                    config.$field.clone_from(value);
                })*
            };
        }
        replace!(
            filter,
            allowed_networks,
            allowed_ports,
            limits,
            self_preservation,
            publish_interval_ms,
            policy,
            adaptive,
            headroom,
            consistent,
            zones,
            candidates,
            hash_on,
            name_servers,
            load_reports,
            load_reports_to_clients,
            load_report_metrics,
            default_port,
            retries,
            retry,
            overload,
            leader_wait_ms,
            backends
        );
        config.load_report_format = group.load_report_format.or(config.load_report_format);
        match &group.registry {
            Some(registry) => config.registry.clone_from(registry),
            // Two groups with one prefix would be the same nodes.
            None => config.registry.prefix = None,
        }
        config
            .further_registries
            .clone_from(&group.further_registries);
        config.group = group.group.clone().unwrap_or_else(|| name.to_owned());
        config.snapshot.clone_from(&group.snapshot);
        config.leader.clone_from(&group.leader);
        if group.health_check.is_some() {
            config.health_check.clone_from(&group.health_check);
        }
        config.sticky_cookie.clone_from(&group.sticky_cookie);
        group.timeouts.replace_in(&mut config.timeouts);
        config.groups.clear();
        config.routes.clear();
        config
    }

    pub(super) fn check_groups(&self) -> Result<(), ClusterError> {
        let mut cookies: Vec<_> = self.sticky_cookie.iter().collect();
        let mut files: Vec<_> = self.snapshot.iter().map(|file| &file.path).collect();
        for (name, group) in &self.groups {
            let field = format!("cluster.groups.{name}");
            if *name == self.group {
                let reason = "has the name of cluster.group, so nobody could tell them apart";
                return Err(ClusterError::config(field, reason));
            }
            if name == DEFAULT_GROUP {
                let reason = "is the name of the group that cluster.group names";
                return Err(ClusterError::config(field, reason));
            }
            if !is_token(name) {
                let reason = format!(
                    "{name:?} is not a name: letters, digits, and signs such as - and _ are allowed"
                );
                return Err(ClusterError::config("cluster.groups", reason));
            }
            self.check_tunnel(&format!("{field}.timeouts"), group.timeouts.tunnel_ms)?;
            let Some(config) = self.of_group(name) else {
                continue;
            };
            config.check_section().map_err(|error| match error {
                ClusterError::InvalidConfig {
                    field: of_section,
                    reason,
                } => {
                    let rest = of_section.strip_prefix("cluster.").unwrap_or(&of_section);
                    ClusterError::config(format!("{field}.{rest}"), reason)
                }
                other => other,
            })?;
            if let Some(file) = &group.snapshot {
                if files.contains(&&file.path) {
                    let reason = format!("{} is the file of another group", file.path.display());
                    return Err(ClusterError::config(
                        format!("{field}.snapshot.file"),
                        reason,
                    ));
                }
                files.push(&file.path);
            }
            if let Some(cookie) = &group.sticky_cookie {
                if cookies.contains(&cookie) {
                    let reason = format!(
                        "{cookie:?} is the cookie of another group: each would replace what the other has set"
                    );
                    return Err(ClusterError::config(
                        format!("{field}.sticky_cookie"),
                        reason,
                    ));
                }
                cookies.push(cookie);
            }
        }
        Ok(())
    }

    /// The listener, which is of all groups, ends a quiet tunnel, too.
    fn check_tunnel(&self, field: &str, given: Option<u64>) -> Result<(), ClusterError> {
        let most = self.timeouts.tunnel_ms;
        match given {
            Some(given) if given > most => {
                let reason = format!(
                    "{given} is longer than cluster.timeouts.tunnel_ms, {most}, which ends tunnels before"
                );
                Err(ClusterError::config(format!("{field}.tunnel_ms"), reason))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn check_routes(&self) -> Result<(), ClusterError> {
        for (index, route) in self.routes.iter().enumerate() {
            let field = format!("cluster.routes[{index}]");
            route.validate(&field)?;
            for (name, group) in route.groups() {
                let Some(of_group) = self.of_group(group) else {
                    let reason = format!("there is no group {group:?} in cluster.groups");
                    return Err(ClusterError::config(format!("{field}.{name}"), reason));
                };
                let is_served = name != "mirror.group";
                if route.leader && is_served && !of_group.registry.is_native() {
                    let reason =
                        format!("the group {group:?} is in another registry, and has no leader");
                    return Err(ClusterError::config(format!("{field}.leader"), reason));
                }
            }
            self.check_tunnel(&format!("{field}.timeouts"), route.timeouts.tunnel_ms)?;
            let before = &self.routes[..index];
            if let Some(first) = before.iter().position(|before| before.includes(route)) {
                let reason = format!(
                    "no request can reach it, because cluster.routes[{first}] is for all of its requests"
                );
                return Err(ClusterError::config(field, reason));
            }
            // One without a name is called by its number.
            let name_of = |index: usize| match &self.routes[index].name {
                Some(name) => name.clone(),
                None => format!("route-{}", index + 1),
            };
            if (0..index).any(|before| name_of(before) == name_of(index)) {
                let reason = "is the name of another route";
                return Err(ClusterError::config(format!("{field}.name"), reason));
            }
        }
        Ok(())
    }
}
