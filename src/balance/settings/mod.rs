//! What a user can set: the policy, and the constants of each, with their defaults and ranges.

mod adaptive;
mod consistent;
mod headroom;
mod policy;
mod zones;

pub use adaptive::Adaptive;
pub use consistent::Consistent;
pub use headroom::Headroom;
pub use policy::Policy;
pub use zones::Zones;
