//! Listing keys: page by page, several selections at once, and from a single member without quorum.

use std::sync::Arc;

use etcd_client::{Client, KvClient, TxnOp, TxnOpResponse};

use super::call::Repeat;
use super::connector::Connector;
use super::convert::{cluster_of, entry, key_range, revision_of};
use super::paging::{EntrySizes, page_options};
use super::status::{CallError, Failure, Subject, bounded};
use super::watch_stream::LARGEST_RESPONSE;
use crate::error::ClusterError;
use crate::ids::Revision;
use crate::store::types::{Listing, Page, Selector};

/// Lists keys, and remembers how large their entries are.
#[derive(Debug, Clone)]
pub(super) struct Lister {
    sizes: Arc<EntrySizes>,
}

impl Lister {
    pub(super) fn new() -> Self {
        Self {
            sizes: Arc::default(),
        }
    }

    pub(super) async fn page(
        &self,
        connector: &Arc<Connector>,
        keys: &Selector,
        start: Option<Vec<u8>>,
        at: Option<Revision>,
    ) -> Result<Page, ClusterError> {
        let (first, end) = key_range(keys);
        let start = start.unwrap_or(first);
        loop {
            let entries = self.sizes.page_entries(keys);
            let options = page_options(end.as_deref(), at, entries);
            let subject = Subject {
                keys: &[keys.as_str()],
                lease: None,
            };
            let page = connector
                .call("list", subject, Repeat::OnAnotherConnection, |client| {
                    let (from, options) = (start.clone(), options.clone());
                    async move { large_kv(&client).get(from, Some(options)).await }
                })
                .await;
            match page {
                Err(ClusterError::TooLarge { .. }) if entries > 1 => {
                    self.sizes.page_was_too_large(keys, entries);
                }
                page => return Ok(self.sizes.page(keys, &page?, at)),
            }
        }
    }

    pub(super) async fn list(
        &self,
        connector: &Arc<Connector>,
        keys: &Selector,
        at: Option<Revision>,
    ) -> Result<Listing, ClusterError> {
        let first = self.page(connector, keys, None, at).await?;
        let (mut listing, mut next) = (first.listing, first.next);
        while let Some(start) = next {
            let at = Some(listing.revision);
            let page = self.page(connector, keys, Some(start), at).await?;
            listing.entries.extend(page.listing.entries);
            next = page.next;
        }
        Ok(listing)
    }

    /// Lists several selections in one request, unless one of them needs more than a page.
    pub(super) async fn all(
        &self,
        connector: &Arc<Connector>,
        all: &[Selector],
    ) -> Result<Vec<Listing>, ClusterError> {
        let reads: Vec<_> = all
            .iter()
            .map(|keys| {
                let (start, end) = key_range(keys);
                let entries = self.sizes.page_entries(keys);
                let options = page_options(end.as_deref(), None, entries);
                TxnOp::get(start, Some(options))
            })
            .collect();
        let request = etcd_client::Txn::new().and_then(reads);
        let names: Vec<_> = all.iter().map(Selector::as_str).collect();
        let subject = Subject {
            keys: &names,
            lease: None,
        };
        let response = connector
            .call("list", subject, Repeat::OnAnotherConnection, |client| {
                let request = request.clone();
                async move { large_kv(&client).txn(request).await }
            })
            .await?;
        let revision = revision_of(response.header());
        let cluster_id = cluster_of(response.header()).unwrap_or_default();
        let mut listings = Vec::with_capacity(all.len());
        for (keys, answer) in all.iter().zip(response.op_responses()) {
            let TxnOpResponse::Get(page) = answer else {
                continue;
            };
            if page.more() {
                listings.push(self.list(connector, keys, Some(revision)).await?);
                continue;
            }
            listings.push(Listing {
                revision,
                cluster_id,
                entries: page.kvs().iter().map(entry).collect(),
            });
        }
        Ok(listings)
    }

    /// Lists keys as any one member has them: the first that answers.
    pub(super) async fn stale(
        &self,
        connector: &Arc<Connector>,
        keys: &Selector,
    ) -> Result<Listing, ClusterError> {
        let mut last = None;
        for endpoint in connector.endpoints() {
            // Each address of its name in turn. How many there are is known after the first dial.
            let mut tried = 0;
            while tried < connector.link().addresses(std::slice::from_ref(&endpoint)) {
                tried += 1;
                match self.of_member(connector, &endpoint, keys).await {
                    Ok(listing) => return Ok(listing),
                    Err(error) => last = Some(error),
                }
            }
        }
        Err(last.unwrap_or_else(|| ClusterError::config("endpoints", "must not be empty")))
    }

    async fn of_member(
        &self,
        connector: &Connector,
        endpoint: &str,
        keys: &Selector,
    ) -> Result<Listing, ClusterError> {
        connector.paced().await;
        let within = connector.options.connect_timeout;
        let client = connector.dial(endpoint, false, within).await?.client;
        let listed = self.serializable(connector, &client, keys).await;
        listed.map_err(|error| {
            let subject = Subject {
                keys: &[keys.as_str()],
                lease: None,
            };
            connector.explain("list", endpoint, subject, &error)
        })
    }

    /// Lists keys as the member at the other end of this client has them.
    async fn serializable(
        &self,
        connector: &Connector,
        client: &Client,
        keys: &Selector,
    ) -> Result<Listing, CallError> {
        let (mut start, end) = key_range(keys);
        let mut listing: Option<Listing> = None;
        loop {
            let at = listing.as_ref().map(|listing| listing.revision);
            let entries = self.sizes.page_entries(keys);
            let options = page_options(end.as_deref(), at, entries).with_serializable();
            let mut kv = large_kv(client);
            let request = kv.get(start.clone(), Some(options));
            let page = match bounded(connector.options.request_timeout, request).await {
                Err(error) if matches!(error.failure, Failure::TooLarge(_)) && entries > 1 => {
                    self.sizes.page_was_too_large(keys, entries);
                    continue;
                }
                page => self.sizes.page(keys, &page?, at),
            };
            let listing = match &mut listing {
                Some(listing) => {
                    listing.entries.extend(page.listing.entries);
                    listing
                }
                none => none.insert(page.listing),
            };
            match page.next {
                Some(next) => start = next,
                None => return Ok(std::mem::take(listing)),
            }
        }
    }
}

/// A client that accepts large answers.
fn large_kv(client: &Client) -> KvClient {
    client
        .kv_client()
        .max_decoding_message_size(LARGEST_RESPONSE)
}
