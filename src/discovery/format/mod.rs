//! How the entries of a group are written: as this crate does, or as other registries do.

mod address;
mod decode;
mod kinds;
mod pick;
mod places;
mod presets;
mod registry;
mod table;

pub(super) use address::{Address, Host};
pub(super) use decode::{Decoded, Fault};
pub use kinds::{Format, HostNames, Scheme};
pub(super) use places::{Decoders, Places, Reader};
pub use registry::Registry;
pub use table::{
    AddressAt, EntryTable, Equals, HostAndPort, MetricAt, Scalar, WeightAt, ZeroWeight,
};

#[cfg(test)]
mod tests;
