//! What the README promises, tried on the programs: started as processes, on the real clock, and looked
//! at from outside.

#[path = "../common/mod.rs"]
mod common;

#[path = "../chaos/etcd_cluster.rs"]
#[allow(dead_code)] // what the chaos test uses of it
mod etcd_cluster;

mod away;
mod deaths;
mod fields;
mod logs;
mod members;
mod snapshot;
mod store;
mod table;
mod world;
