//! Tests of the watch table, with responses and requests as values.

use std::time::Duration;

use super::*;
use crate::store::types::{Selector, WatchEvent};

struct World {
    table: WatchTable,
    reader: ReaderQueue,
    deliveries: mpsc::Receiver<Delivery>,
}

impl World {
    fn new() -> Self {
        let round_trips = RoundTrips::new(Duration::from_millis(1), 0);
        let next_id = Arc::new(AtomicI64::new(100));
        let (sender, deliveries) = mpsc::channel(2);
        Self {
            table: WatchTable::new("e".into(), true, round_trips, next_id),
            reader: ReaderQueue {
                deliveries: sender,
                is_behind: Arc::default(),
            },
            deliveries,
        }
    }

    fn open(&mut self, id: i64, from: Revision) {
        let range = range(from);
        self.table
            .open(id, range, self.reader.clone(), Instant::now());
    }

    fn requests(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.table.next_request()).collect()
    }

    fn receive(&mut self, response: Response) {
        self.table.receive(response, Instant::now());
    }
}

fn range(from: Revision) -> WatchRange {
    WatchRange {
        keys: Selector::Prefix("a/".to_owned()),
        from,
    }
}

fn confirmation(number: i64) -> Response {
    Response {
        number,
        is_confirmation: true,
        is_end: false,
        failure: None,
        revision: 10,
        events: Vec::new(),
    }
}

fn event(number: i64, revision: Revision) -> Response {
    Response {
        is_confirmation: false,
        events: vec![WatchEvent::Delete {
            key: "a/1".to_owned(),
            revision,
        }],
        ..confirmation(number)
    }
}

#[test]
fn a_server_that_uses_our_ids_gets_all_requests_at_once() {
    let mut world = World::new();
    world.open(1, 0);
    world.open(2, 7);
    world.open(3, 7);
    assert_eq!(world.requests(), [Request::Watch(1, range(0))]);
    world.receive(confirmation(1));
    let both = [Request::Watch(2, range(7)), Request::Watch(3, range(7))];
    assert_eq!(world.requests(), both);
    world.table.close(1);
    assert_eq!(world.requests(), [Request::Cancel(1)]);
    // Closed before it is confirmed.
    world.table.close(2);
    assert_eq!(world.requests(), []);
    world.receive(confirmation(2));
    assert_eq!(world.requests(), [Request::Cancel(2)]);
}

#[test]
fn a_server_with_its_own_numbers_gets_one_request_at_a_time() {
    let mut world = World::new();
    world.open(1, 7);
    world.open(2, 7);
    world.requests();
    world.receive(confirmation(50));
    assert_eq!(world.requests(), [Request::Watch(2, range(7))]);
    world.open(3, 7);
    assert_eq!(world.requests(), []);
    world.receive(confirmation(51));
    assert_eq!(world.requests(), [Request::Watch(3, range(7))]);
    let Some(Delivery::Response(1, _)) = world.deliveries.try_recv().ok() else {
        panic!("the first confirmation is for the first watch")
    };
    world.table.close(2);
    assert_eq!(world.requests(), [Request::Cancel(51)]);
}

#[test]
fn a_watch_that_the_server_ended_is_cancelled_where_a_proxy_keeps_it() {
    for (number, expected) in [(50, vec![Request::Cancel(50)]), (1, vec![])] {
        let mut world = World::new();
        world.open(1, 7);
        world.requests();
        world.receive(confirmation(number));
        world.receive(Response {
            is_confirmation: false,
            is_end: true,
            ..confirmation(number)
        });
        assert_eq!(world.requests(), expected);
    }
}

#[test]
fn a_watch_is_replaced_without_its_reader() {
    let mut world = World::new();
    world.open(1, 0);
    world.receive(confirmation(1));
    world.deliveries.try_recv().unwrap();
    world.requests();
    world.receive(event(1, 20));
    world.deliveries.try_recv().unwrap();
    world.table.open_again(Instant::now());
    assert_eq!(world.requests(), [Request::Watch(100, range(21))]);
    // Once only.
    world.table.open_again(Instant::now());
    assert_eq!(world.requests(), []);
    world.receive(confirmation(100));
    assert_eq!(world.requests(), [Request::Cancel(1)]);
    assert!(world.deliveries.try_recv().is_err());
    world.receive(event(100, 30));
    assert!(matches!(
        world.deliveries.try_recv(),
        Ok(Delivery::Response(1, _))
    ));
}

#[test]
fn progress_covers_watches_that_were_confirmed_before_the_request() {
    let mut world = World::new();
    world.open(1, 5);
    world.receive(confirmation(1));
    world.deliveries.try_recv().unwrap();
    world.table.request_progress(Instant::now());
    world.open(2, 5);
    world.receive(confirmation(2));
    world.deliveries.try_recv().unwrap();
    let progress = Response {
        is_confirmation: false,
        ..confirmation(-1)
    };
    world.receive(progress);
    assert!(matches!(
        world.deliveries.try_recv(),
        Ok(Delivery::Progress(1, 10))
    ));
    assert!(world.deliveries.try_recv().is_err());
}

#[test]
fn a_reader_that_is_behind_loses_all_its_ranges() {
    let mut world = World::new();
    world.open(1, 5);
    world.open(2, 5);
    world.receive(confirmation(1));
    world.receive(confirmation(2));
    world.requests();
    // The queue has room for two.
    world.receive(event(1, 20));
    assert!(world.reader.is_behind.load(Ordering::Acquire));
    assert!(world.table.is_empty());
    let mut requests = world.requests();
    requests.sort_by_key(|request| format!("{request:?}"));
    assert_eq!(requests, [Request::Cancel(1), Request::Cancel(2)]);
}
