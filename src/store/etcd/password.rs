//! The user's password, read again for each authentication.

use std::sync::Mutex;

use tracing::warn;

use super::credentials::Password;
use super::files::FileReader;
use super::options::EtcdOptions;
use super::status::with_user;
use super::token::User;
use crate::error::ClusterError;
use crate::sync::lock;

/// The password as it was last read.
#[derive(Debug, Default)]
pub(super) struct LastPassword(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    password: Option<Password>,
    /// It was logged that the password cannot be read any more.
    is_reported: bool,
}

impl LastPassword {
    /// The configured user with the current password, or with the last one if it cannot be read.
    /// `None` if no user is configured.
    pub(super) async fn user(
        &self,
        options: &EtcdOptions,
        files: &FileReader,
        endpoint: &str,
    ) -> Result<Option<User>, ClusterError> {
        let Some(credentials) = options.credentials.clone() else {
            return Ok(None);
        };
        let source = credentials.password;
        let read = files.read(endpoint, move || source.read()).await?;
        let mut last = lock(&self.0);
        let password = match (read, &last.password) {
            (Ok(password), _) => {
                *last = State {
                    password: Some(Password::Text(password.clone())),
                    is_reported: false,
                };
                password
            }
            // Perhaps it is being replaced just now, and the one before is still right.
            (Err(error), Some(Password::Text(before))) => {
                let before = before.clone();
                if !std::mem::replace(&mut last.is_reported, true) {
                    warn!(endpoint, %error, "the password cannot be read, the last one is used until it can");
                }
                before
            }
            (Err(error), _) => {
                return Err(ClusterError::Auth {
                    endpoint: endpoint.to_owned(),
                    reason: with_user(error, options),
                });
            }
        };
        Ok(Some((credentials.user, password)))
    }
}
