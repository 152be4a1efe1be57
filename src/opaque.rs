//! `Debug` for types that contain what cannot be shown.

/// Shows the name of each type, so that a struct that has one can derive `Debug`.
macro_rules! opaque_debug {
    ($($name:ident $(<$parameter:ident>)?),+ $(,)?) => {
        $(impl$(<$parameter>)? std::fmt::Debug for $name$(<$parameter>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        })+
    };
}

pub(crate) use opaque_debug;
