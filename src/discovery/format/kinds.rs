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

/// Which of the addresses of a process is used, and how it is spoken to.
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
