//! Where a group reads entries: in its own registry, and in further ones beside it.

use super::decode::Decoder;
use super::kinds::HostNames;
use super::registry::Registry;
use crate::error::ClusterError;
use crate::keys::{FurtherKeys, GroupKeys};

/// The registries of a group.
#[derive(Debug, Clone, Default)]
pub(in crate::discovery) struct Places {
    pub(in crate::discovery) main: Registry,
    pub(in crate::discovery) further: Vec<Registry>,
}

impl Places {
    /// Checks every field. Errors name it.
    pub(in crate::discovery) fn validate(&self) -> Result<(), ClusterError> {
        self.main.validate("registry")?;
        for (index, registry) in self.further.iter().enumerate() {
            registry.validate(&format!("further_registries[{index}]"))?;
        }
        Ok(())
    }

    /// The keys of a group.
    ///
    /// # Errors
    ///
    /// If an entry would be in two of them, or this crate's own nodes are not in the first one.
    pub(in crate::discovery) fn keys(
        &self,
        key_prefix: &str,
        group: &str,
    ) -> Result<GroupKeys, ClusterError> {
        let keys = match self.main.prefix_of(group) {
            Some(prefix) => GroupKeys::of_others(prefix, self.main.has_nested_keys()),
            None => GroupKeys::new(key_prefix, group),
        };
        let mut further: Vec<FurtherKeys> = Vec::new();
        for (index, registry) in self.further.iter().enumerate() {
            let error = |field: &str, reason: String| {
                let field = format!("further_registries[{index}].{field}");
                Err(ClusterError::config(field, reason))
            };
            let Some(prefix) = registry.prefix_of(group) else {
                let reason = "native has to be the format of registry itself: with it are the leader and \
                              what operators say";
                return error("format", reason.to_owned());
            };
            let others = further.iter().map(|keys| &*keys.prefix);
            let others = std::iter::once(keys.registry_prefix()).chain(others);
            for other in others {
                if prefix.starts_with(other) || other.starts_with(&prefix) {
                    let reason = format!("{prefix:?} has keys in common with {other:?}");
                    return error("prefix", reason);
                }
            }
            further.push(FurtherKeys {
                prefix,
                nested: registry.has_nested_keys(),
                label: self.label(index),
            });
        }
        Ok(keys.with_further(further))
    }

    /// What stands before the ids of a further registry.
    fn label(&self, index: usize) -> String {
        let format = self.further[index].format;
        let before = self.further[..index].iter();
        match before.filter(|other| other.format == format).count() {
            0 => format.name().to_owned(),
            count => format!("{}-{}", format.name(), count + 1),
        }
    }

    /// What makes nodes of entries.
    pub(in crate::discovery) fn decoders(&self, group: &str) -> Decoders {
        let further = self.further.iter().filter_map(|registry| {
            let reader = Reader {
                decoder: registry.decoder()?,
                host_names: registry.host_names,
            };
            Some((registry.prefix_of(group)?, reader))
        });
        Decoders {
            main: self.main.decoder().map(|decoder| Reader {
                decoder,
                host_names: self.main.host_names,
            }),
            further: further.collect(),
            labels: (0..self.further.len())
                .map(|index| self.label(index))
                .collect(),
        }
    }

    /// A word for a snapshot file, which is not read with other registries.
    pub(in crate::discovery) fn mark(&self, group: &str) -> String {
        let all = std::iter::once(&self.main).chain(&self.further);
        let marks: Vec<_> = all.map(|registry| registry.mark(group)).collect();
        marks.join(" | ")
    }
}

/// What reads the entries of a registry.
#[derive(Debug, Clone)]
pub(in crate::discovery) struct Reader {
    pub(in crate::discovery) decoder: Decoder,
    pub(in crate::discovery) host_names: HostNames,
}

/// What makes nodes of the entries of a group, by their keys.
#[derive(Debug, Clone, Default)]
pub(in crate::discovery) struct Decoders {
    /// `None` for this crate's own format.
    main: Option<Reader>,
    /// By the prefix of the keys.
    further: Vec<(String, Reader)>,
    /// What stands before the ids of those.
    labels: Vec<String>,
}

impl Decoders {
    /// What reads the entry with this key; `None` if this crate's nodes write it. And its place among the registries,
    /// 0 for the first one.
    pub(in crate::discovery) fn of(&self, key: &str) -> (Option<&Reader>, u8) {
        let further = self.further.iter().zip(1_u8..);
        let mut found = further.filter(|((prefix, _), _)| key.starts_with(&**prefix));
        match found.next() {
            Some(((_, reader), place)) => (Some(reader), place),
            None => (self.main.as_ref(), 0),
        }
    }

    /// Checks that the id of an entry cannot be that of a node elsewhere: ids of further registries have a label in
    /// front of them, and those of host names an address behind them. An error is in words.
    pub(in crate::discovery) fn check_id(&self, id: &str, key: &str) -> Result<(), String> {
        let (reader, place) = self.of(key);
        let is_labelled = |label: &String| {
            let rest = id.strip_prefix(&**label);
            rest.is_some_and(|rest| rest.starts_with(':'))
        };
        if place == 0
            && let Some(label) = self.labels.iter().find(|label| is_labelled(label))
        {
            return Err(format!(
                "its id begins with {label}: as those of a further registry do"
            ));
        }
        let all = reader.is_some_and(|reader| reader.host_names == HostNames::All);
        match all && id.contains('@') {
            true => Err(
                "its id contains @, which stands before the addresses of a host name".to_owned(),
            ),
            false => Ok(()),
        }
    }

    /// Whether host names are resolved.
    pub(in crate::discovery) fn resolve(&self) -> bool {
        let all = self
            .main
            .iter()
            .chain(self.further.iter().map(|(_, reader)| reader));
        let mut all = all.map(|reader| reader.host_names);
        all.any(|host_names| host_names != HostNames::Refused)
    }
}
