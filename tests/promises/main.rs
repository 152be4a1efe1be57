//! What the README promises, tried on the programs: started as processes, on the real clock, and looked
//! at from outside.

#[path = "../common/mod.rs"]
mod common;

mod logs;
mod snapshot;
mod world;
