//! The token of a connection, with which etcd knows the user: getting one, and counting refreshes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use etcd_client::{Client, ConnectOptions};
use tokio::sync::Mutex;

use super::status::{CallError, Failure};
use crate::error::ClusterError;

/// Name and password.
pub(super) type User = (String, String);

/// The state of a connection's token. It is refreshed by one caller at a time; the others wait for the
/// result. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Token(Arc<TokenState>);

#[derive(Default)]
struct TokenState {
    refreshes: AtomicU64,
    /// There is a user, but no token, because authentication was not enabled.
    is_missing: AtomicBool,
    /// Held during a refresh. The error of the last one.
    last_error: Mutex<Option<ClusterError>>,
}

impl Token {
    fn new(is_missing: bool) -> Self {
        let token = Self::default();
        token.set_missing(is_missing);
        token
    }

    pub(super) fn is_missing(&self) -> bool {
        self.0.is_missing.load(Ordering::Acquire)
    }

    /// Returns whether it was missing before.
    pub(super) fn set_missing(&self, missing: bool) -> bool {
        self.0.is_missing.swap(missing, Ordering::AcqRel)
    }

    /// Changes with each refresh. To be read before a call that may find the token refused.
    pub(super) fn version(&self) -> u64 {
        self.0.refreshes.load(Ordering::Acquire)
    }

    /// Refreshes the token by `refresh`, unless somebody else has since `version`. Returns the result
    /// of the last refresh.
    pub(super) async fn refresh_once(
        &self,
        version: u64,
        refresh: impl Future<Output = Result<(), ClusterError>>,
    ) -> Result<(), ClusterError> {
        let mut last_error = self.0.last_error.lock().await;
        if self.version() == version {
            *last_error = refresh.await.err();
            self.0.refreshes.fetch_add(1, Ordering::Release);
        }
        last_error.clone().map_or(Ok(()), Err)
    }
}

/// A client for one endpoint, with a token of this user. If authentication is not enabled it goes on
/// without one, as etcd's own client does: so enabling it later interrupts nobody.
pub(super) async fn connect_as(
    endpoint: &str,
    connect: ConnectOptions,
    user: Option<User>,
) -> Result<(Client, Token), CallError> {
    // Without a user this does no I/O yet.
    let mut client = Client::connect([endpoint], Some(connect)).await?;
    let has_token = match user {
        Some(user) => authenticate(&mut client, user).await?,
        None => true,
    };
    Ok((client, Token::new(!has_token)))
}

/// Gets a token. Returns whether there is one: `false` if authentication is not enabled.
pub(super) async fn authenticate(client: &mut Client, user: User) -> Result<bool, CallError> {
    match client
        .update_user(Some(user))
        .await
        .map_err(CallError::from)
    {
        Err(error) if error.failure == Failure::AuthNotEnabled => {
            client.update_user(None).await?;
            Ok(false)
        }
        result => result.map(|()| true),
    }
}
