//! The tables of known registries.

use super::kinds::Format;
use super::table::{AddressAt, EntryTable, Equals, IN_KEY, Scalar, WeightAt, ZeroWeight};

fn at(place: &str) -> AddressAt {
    AddressAt::Whole(place.to_owned())
}

/// A weight, and that of entries which have none, or one that is not above zero.
fn weight(at: &str, default: f64) -> Option<WeightAt> {
    Some(WeightAt {
        at: at.to_owned(),
        default,
        zero: ZeroWeight::Default,
    })
}

pub(super) fn table(format: Format) -> EntryTable {
    let place = |place: &str| Some(place.to_owned());
    match format {
        // A reader in Go takes field names in any case.
        Format::Grpc => EntryTable {
            address: vec![at("/Addr"), at("/addr")],
            nested: true,
            metadata: place("/Metadata"),
            ..EntryTable::default()
        },
        Format::GoZero => EntryTable {
            text: true,
            ..EntryTable::default()
        },
        Format::Kratos => EntryTable {
            address: vec![at("/endpoints")],
            weight: weight("/metadata/weight", 100.0),
            tags: vec!["/version".to_owned()],
            metadata: place("/metadata"),
            ..EntryTable::default()
        },
        Format::Cloudwego => EntryTable {
            require: vec![Equals {
                at: "/network".to_owned(),
                is: ["tcp", "tcp4", "tcp6"]
                    .map(|network| Scalar::Text(network.to_owned()))
                    .into(),
            }],
            address: vec![at("/address")],
            weight: weight("/weight", 10.0),
            tags: vec!["/tags".to_owned()],
            metadata: place("/tags"),
            ..EntryTable::default()
        },
        Format::GoMicro => EntryTable {
            address: vec![at("/nodes/0/address")],
            scheme: place("/nodes/0/metadata/protocol"),
            tags: vec!["/version".to_owned()],
            metadata: place("/nodes/0/metadata"),
            ..EntryTable::default()
        },
        Format::Goframe => EntryTable {
            address: vec![at(IN_KEY)],
            nested: true,
            scheme: place("/protocol"),
            weight: weight("/weight", 1.0),
            metadata: place(""),
            ..EntryTable::default()
        },
        Format::Native | Format::Custom => EntryTable::default(),
    }
}
