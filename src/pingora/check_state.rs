//! What checks of a node come to. Pure.

/// A node, by its checks so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct CheckState {
    /// `None` before the first check.
    is_well: Option<bool>,
    /// Checks in a row that say something else.
    against: u32,
}

impl CheckState {
    /// Whether the node is well; `None` before the first check.
    pub(super) fn is_well(self) -> Option<bool> {
        self.is_well
    }

    /// The state after a check: the first one decides, and then so many in a row that say something else.
    pub(super) fn after(self, passed: bool, rise: u32, fall: u32) -> Self {
        let Some(is_well) = self.is_well else {
            return Self::known(passed);
        };
        if passed == is_well {
            return Self::known(is_well);
        }
        let against = self.against + 1;
        let needed = if passed { rise } else { fall };
        match against >= needed {
            true => Self::known(passed),
            false => Self {
                is_well: Some(is_well),
                against,
            },
        }
    }

    fn known(is_well: bool) -> Self {
        Self {
            is_well: Some(is_well),
            against: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_in_a_row_decide() {
        let after = |checks: &str| {
            let mut state = CheckState::default();
            for check in checks.chars() {
                state = state.after(check == '+', 2, 3);
            }
            state.is_well()
        };
        for (checks, expected) in [
            ("", None),
            ("+", Some(true)),
            ("-", Some(false)),
            ("+--", Some(true)),
            ("+---", Some(false)),
            ("+--+--", Some(true)),
            ("-+", Some(false)),
            ("-++", Some(true)),
            ("-+-+", Some(false)),
            ("+---+", Some(false)),
            ("+---++", Some(true)),
        ] {
            assert_eq!(after(checks), expected, "{checks}");
        }
    }
}
