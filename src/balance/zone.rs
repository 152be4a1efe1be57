//! Zones: near backends first, the others by as much as the near ones are under pressure.

/// Placeholder.
#[derive(Debug, Clone, Default)]
pub(crate) struct Zones {}
