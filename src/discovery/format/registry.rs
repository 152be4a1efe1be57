//! Where entries are, and how they are written.

use serde::Deserialize;

use super::decode::Decoder;
use super::kinds::{Format, HostNames, Scheme};
use super::presets;
use super::table::EntryTable;
use crate::error::ClusterError;

/// Where the entries of a group are, and how they are written. The default is this crate's own format.
///
/// A group in another format has no leader, and operators cannot drain or weigh its nodes. Filter, allowed networks and
/// ports, limits, self-preservation and the snapshot file hold for it as for any other.
///
/// ```
/// use pingora_etcd::{ServiceDiscovery, discovery::{Format, Registry, Scheme}};
///
/// # fn main() -> Result<(), pingora_etcd::ClusterError> {
/// let etcd = vec!["http://127.0.0.1:2379".to_owned()];
/// let registry = Registry::new(Format::Kratos).scheme(Scheme::Http);
/// ServiceDiscovery::builder(etcd, "billing").registry(registry).try_build()?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Registry {
    /// Who writes the entries. Default: `native`.
    pub format: Format,
    /// The whole prefix of their keys, which ends with a slash; `etcd.key_prefix` is not put in front of it. Not for
    /// `native`. Default: that of the format.
    pub prefix: Option<String>,
    /// Which of the addresses of an entry is used, and how it is spoken to; entries without such an address are left
    /// out. Default: `any`.
    pub scheme: Scheme,
    /// How the entries are read, with the format `custom`. Default: none.
    pub custom: Option<EntryTable>,
    /// What becomes of addresses with a host name (feature `host-names`). Default: `refused`.
    pub host_names: HostNames,
}

impl Registry {
    /// Entries in this format, below its prefix.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            ..Self::default()
        }
    }

    /// Entries that are read as this table says, below this prefix.
    pub fn custom(prefix: impl Into<String>, table: EntryTable) -> Self {
        Self {
            format: Format::Custom,
            prefix: Some(prefix.into()),
            custom: Some(table),
            ..Self::default()
        }
    }

    /// Sets [`prefix`](Self::prefix).
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// Sets [`scheme`](Self::scheme).
    #[must_use]
    pub fn scheme(mut self, scheme: Scheme) -> Self {
        self.scheme = scheme;
        self
    }

    /// Sets [`host_names`](Self::host_names).
    #[must_use]
    pub fn host_names(mut self, host_names: HostNames) -> Self {
        self.host_names = host_names;
        self
    }

    /// Whether it is this crate's own format.
    pub fn is_native(&self) -> bool {
        self.format == Format::Native
    }

    /// Checks every field. Errors name it as a part of `field`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`](ClusterError::InvalidConfig), naming the field and what is allowed.
    pub fn validate(&self, field: &str) -> Result<(), ClusterError> {
        let error = |name: &str, reason: String| {
            Err(ClusterError::config(format!("{field}.{name}"), reason))
        };
        if let Some(prefix) = &self.prefix {
            if self.is_native() {
                let reason = "is for other formats; use etcd.key_prefix and group";
                return error("prefix", reason.to_owned());
            }
            if !prefix.ends_with('/') {
                let reason = format!(
                    "{prefix:?} does not end with a slash: the keys of {prefix}-2 would belong to it"
                );
                return error("prefix", reason);
            }
        }
        match (&self.custom, self.format) {
            (Some(table), Format::Custom) => {
                table.validate(&format!("{field}.custom"))?;
                if self.prefix.is_none() {
                    return error(
                        "prefix",
                        "is missing: the format custom has none of its own".to_owned(),
                    );
                }
            }
            (None, Format::Custom) => {
                return error(
                    "custom",
                    "is missing: it says how entries are read".to_owned(),
                );
            }
            (Some(_), _) => return error("custom", "is only for the format custom".to_owned()),
            (None, _) => {}
        }
        if self.is_native() && self.scheme != Scheme::Any {
            let reason = "entries of this format do not name one; set backends.protocol instead";
            return error("scheme", reason.to_owned());
        }
        if self.host_names != HostNames::Refused {
            if self.is_native() {
                let reason = "is for other formats: this one has IP addresses";
                return error("host_names", reason.to_owned());
            }
            if !cfg!(feature = "host-names") {
                let reason = "this program is built without the feature host-names";
                return error("host_names", reason.to_owned());
            }
        }
        Ok(())
    }

    pub(super) fn prefix_of(&self, group: &str) -> Option<String> {
        let usual = match self.format {
            Format::Native => return None,
            Format::Grpc | Format::GoZero | Format::Custom => format!("{group}/"),
            Format::Kratos => format!("/microservices/{group}/"),
            Format::Cloudwego => format!("hertz/registry-etcd/{group}/"),
            Format::GoMicro => format!("/micro/registry/{group}/"),
            Format::Goframe => format!("/service/default/default/{group}/"),
        };
        Some(self.prefix.clone().unwrap_or(usual))
    }

    pub(super) fn has_nested_keys(&self) -> bool {
        match &self.custom {
            Some(table) => table.nested,
            None => matches!(self.format, Format::Grpc | Format::Goframe),
        }
    }

    /// What makes nodes of entries; `None` for this crate's own format.
    pub(super) fn decoder(&self) -> Option<Decoder> {
        let table = match self.format {
            Format::Native => return None,
            Format::Custom => self.custom.clone().unwrap_or_default(),
            format => presets::table(format),
        };
        Some(match self.format {
            Format::Custom => Decoder::of_urls(table, self.scheme),
            // Both are for servers of gRPC only, unless the file says something else.
            Format::Grpc | Format::GoZero if self.scheme == Scheme::Any => {
                Decoder::new(table, self.scheme, Some("grpc"))
            }
            _ => Decoder::new(table, self.scheme, None),
        })
    }

    /// A word for a snapshot file, which is not read in another format.
    pub(super) fn mark(&self, group: &str) -> String {
        match self.prefix_of(group) {
            None => String::new(),
            Some(prefix) => format!(
                "{:?} {prefix} {:?} {:?} {:?}",
                self.format, self.scheme, self.custom, self.host_names
            ),
        }
    }
}
