//! Tests the README's promises on the programs, which run as processes on the real clock and are
//! observed from outside.

// A test is one scenario, read from top to bottom.
#![allow(clippy::too_many_lines)]

#[path = "../common/mod.rs"]
mod common;

#[path = "../chaos/etcd_cluster.rs"]
#[allow(dead_code)] // the chaos test uses the rest
mod etcd_cluster;

mod access_log;
mod attacks;
mod away;
mod backends;
mod checks;
mod clients;
mod command;
mod deaths;
mod echo;
mod envoy;
mod failing;
mod fields;
mod foreign;
mod grpc;
mod headers;
mod hundreds;
mod kept;
mod languages;
mod leader;
mod learned;
mod listeners;
mod load_reports;
mod logs;
mod members;
mod memory;
mod operate;
mod overload;
mod page;
mod quiet;
mod raw;
mod registries;
mod reload;
mod retries;
mod rfc;
mod rfc_http_2;
mod routes;
mod shutdown;
mod snapshot;
mod sources;
mod spans;
mod store;
mod subset;
mod table;
mod tls;
mod uploads;
mod waits;
mod world;
