//! What health checks have said of a registration.

/// What health checks have said so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Checked {
    /// Nothing yet.
    #[default]
    Unknown,
    Well,
    Down,
}

/// Which registrations are used, by what checks have said of them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// All: there are no checks, nobody is known to be well, or too few are.
    Open,
    /// Those that are well.
    Well,
}

/// Part of those that have been checked that has to be well; with fewer, all are used, because a few could not
/// carry the load of all, and because then the checks may be what is wrong.
pub(super) fn gate(checked: impl IntoIterator<Item = Checked>, panic_threshold: f64) -> Gate {
    let (mut well, mut down) = (0_u32, 0_u32);
    for checked in checked {
        match checked {
            Checked::Unknown => {}
            Checked::Well => well += 1,
            Checked::Down => down += 1,
        }
    }
    let part = f64::from(well) / f64::from((well + down).max(1));
    match well > 0 && part >= panic_threshold {
        true => Gate::Well,
        false => Gate::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_that_are_well_are_not_used_alone() {
        use Checked::{Down, Unknown, Well};
        for (checked, threshold, expected) in [
            (&[][..], 0.5, Gate::Open),
            (&[Unknown, Unknown], 0.5, Gate::Open),
            (&[Down, Down], 0.0, Gate::Open),
            (&[Well, Down], 0.5, Gate::Well),
            (&[Well, Down, Down], 0.5, Gate::Open),
            (&[Well, Down, Down], 0.0, Gate::Well),
            // A node that joins does not change what is known of the others.
            (&[Well, Unknown, Unknown, Unknown], 0.5, Gate::Well),
            (&[Well, Down], 1.0, Gate::Open),
            (&[Well, Well], 1.0, Gate::Well),
        ] {
            assert_eq!(
                gate(checked.iter().copied(), threshold),
                expected,
                "{checked:?} {threshold}"
            );
        }
    }
}
