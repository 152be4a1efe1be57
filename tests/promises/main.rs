//! What the README promises, tried on the programs: started as processes, on the real clock, and looked
//! at from outside.

#[path = "../common/mod.rs"]
mod common;

mod away;
mod deaths;
mod fields;
mod logs;
mod members;
mod snapshot;
mod table;
mod world;
