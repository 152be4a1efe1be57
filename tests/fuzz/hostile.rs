//! Attacks on purpose: as large as the limits allow, as many as anybody can write.
pub(crate) fn all() -> bool {
    true
}
