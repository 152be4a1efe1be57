//! The stream of changes that a reader follows.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio_stream::wrappers::BroadcastStream;

use super::published::Published;
use crate::opaque::opaque_debug;
use crate::view::{Change, Source};

/// The state of a group and every change to it; see
/// [`ServiceDiscovery::changes`](super::ServiceDiscovery::changes).
pub struct Changes {
    published: Arc<Published>,
    inner: BroadcastStream<Change>,
    /// Delivered before what is in `inner`.
    first: VecDeque<Change>,
}

impl Changes {
    pub(super) fn new(published: Arc<Published>) -> Self {
        let (receiver, state) = published.subscribe();
        Self {
            published,
            inner: BroadcastStream::new(receiver),
            first: state.into(),
        }
    }

    /// The next change. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Change {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    fn start_over(&mut self) {
        let (receiver, state) = self.published.subscribe();
        self.inner = BroadcastStream::new(receiver);
        self.first = state.into();
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Change> {
        loop {
            if let Some(change) = self.first.pop_front() {
                return Poll::Ready(change);
            }
            match Pin::new(&mut self.inner).poll_next(context) {
                Poll::Ready(Some(Ok(change))) => return Poll::Ready(change),
                // This reader was too slow. (The sender lives in `published`, so the stream cannot
                // end.)
                Poll::Ready(_) => self.start_over(),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Source for Changes {
    async fn next(&mut self) -> Change {
        Changes::next(self).await
    }
}

impl Stream for Changes {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Change>> {
        self.poll(context).map(Some)
    }
}

opaque_debug!(Changes);
