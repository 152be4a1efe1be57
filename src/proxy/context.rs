//! A request, and who serves it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ::pingora::http::RequestHeader;
use bytes::Bytes;

use super::group::GroupProxy;
use super::mirror::Copy;
use super::request_state::RequestState;
use super::route::Route;
use super::routing::Routing;
use crate::node::Node;
use crate::opaque::opaque_debug;

/// What [`ClusterProxy`](super::ClusterProxy) keeps about a request, and says of it to a proxy that wraps it.
pub struct RequestContext {
    /// What the file said when the request began.
    pub(super) routing: Arc<Routing>,
    /// The route that is for the request.
    pub(super) route: Option<Arc<Route>>,
    /// The group that serves it; `None` until it has been found, and if none does.
    pub(super) group: Option<Arc<GroupProxy>>,
    /// A copy for a mirror, while the request is being received.
    pub(super) copy: Option<Copy>,
    pub(super) state: RequestState,
}

impl RequestContext {
    pub(super) fn new(routing: Arc<Routing>) -> Self {
        Self {
            routing,
            route: None,
            group: None,
            copy: None,
            state: RequestState::new(),
        }
    }

    /// The client's address: behind trusted proxies, the one that they name; `None` for a client at a Unix socket.
    pub fn client(&self) -> Option<IpAddr> {
        self.state.client
    }

    /// The node that the request was sent to last; `None` before, and after its outcome has been reported at the end of
    /// [`logging`](::pingora::proxy::ProxyHttp::logging).
    pub fn node(&self) -> Option<Arc<Node>> {
        self.state.node()
    }

    /// The address that the request was sent to last, as long as [`node`](Self::node) is known.
    pub fn addr(&self) -> Option<SocketAddr> {
        self.state.addr()
    }

    /// How often it has been sent, or a connection for it was tried.
    pub fn tries(&self) -> usize {
        self.state.tries
    }

    /// The name of the group that serves it.
    pub fn group_name(&self) -> Option<&str> {
        self.group.as_ref().map(|group| &*group.name)
    }

    /// The name of the route that is for it.
    pub fn route_name(&self) -> Option<&str> {
        self.route.as_ref().map(|route| &*route.name)
    }

    /// Begins a copy of a request that is being sent for the first time.
    pub(super) fn begin_copy(&mut self, request: &RequestHeader) {
        let mirror = self.route.as_ref().and_then(|route| route.mirror.as_ref());
        let Some(mirror) = mirror.filter(|_| self.state.tries == 1 && !self.state.is_upgrade)
        else {
            // What is sent again is received again, but the copy may be on its way.
            self.copy = None;
            return;
        };
        self.copy = mirror.begin(request);
        if self.state.is_complete
            && let Some(copy) = self.copy.take()
        {
            copy.send();
        }
    }

    /// A part of the request's body has been received.
    pub(super) fn copy_body(&mut self, body: Option<&Bytes>, is_end: bool) {
        let copy = self.copy.take().and_then(|copy| copy.add(body));
        match copy {
            Some(copy) if is_end => copy.send(),
            copy => self.copy = copy,
        }
    }
}

opaque_debug!(RequestContext);
