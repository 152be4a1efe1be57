//! The names of formats and schemes.

use serde::Deserialize;

/// Who has written the entries of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Format {
    /// This crate, `photon-etcd-cluster`, or a program that follows the same protocol.
    #[default]
    Native,
    /// `naming/endpoints` of etcd's own Go client, for gRPC. Prefix: `{group}/`.
    Grpc,
    /// go-zero, which registers gRPC servers. Prefix: `{group}/`.
    GoZero,
    /// Kratos. Prefix: `/microservices/{group}/`.
    Kratos,
    /// Hertz and, with a prefix such as `kitex/registry-etcd/{service}/`, Kitex. Prefix:
    /// `hertz/registry-etcd/{group}/`.
    Cloudwego,
    /// go-micro. Prefix: `/micro/registry/{group}/`.
    GoMicro,
    /// GoFrame, all versions of a service. Prefix: `/service/default/default/{group}/`.
    Goframe,
    /// As the field `custom` of `Registry` says.
    Custom,
}

impl Format {
    /// Its name in the file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Grpc => "grpc",
            Self::GoZero => "go-zero",
            Self::Kratos => "kratos",
            Self::Cloudwego => "cloudwego",
            Self::GoMicro => "go-micro",
            Self::Goframe => "goframe",
            Self::Custom => "custom",
        }
    }
}

/// What becomes of addresses with a host name. Names are resolved with the servers of `/etc/resolv.conf`, each again
/// when its answer is no longer valid, after 1 s to 1 h; while that fails, the last addresses stay in use, and the nodes
/// show it (`host_name_error` in their metadata).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum HostNames {
    /// The entry is refused.
    #[default]
    Refused,
    /// A node at one of the addresses of the name; at the same one while it is among them.
    First,
    /// A node at each of the addresses of the name, with the address after the id: `id@10.2.0.7`.
    All,
}

/// Which of the addresses of a process is used, and how it is spoken to. Addresses that name no scheme are taken to
/// have this one; with the format `custom`, `http://` and `https://` in front of an address also stand for gRPC, with
/// `grpc` and `grpcs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Scheme {
    /// The first one.
    #[default]
    Any,
    /// HTTP/1.1.
    Http,
    /// HTTP/1.1 over TLS.
    Https,
    /// HTTP/2 without TLS.
    Grpc,
    /// HTTP/2 over TLS.
    Grpcs,
}

impl Scheme {
    /// Whether backends are spoken to over TLS.
    #[cfg(feature = "config")]
    pub(crate) fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Grpcs)
    }
}
