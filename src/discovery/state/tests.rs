//! Every transition, as a table.

use std::time::Duration;

use super::State::*;
use super::*;
use crate::store::Selector;

fn at(revision: i64) -> Position {
    Position {
        cluster_id: 7,
        ranges: vec![WatchRange {
            keys: Selector::Prefix("registry/g/".to_owned()),
            from: revision,
        }],
    }
}

fn away() -> ClusterError {
    ClusterError::Timeout {
        endpoint: "e".to_owned(),
        operation: "list",
        after: Duration::from_secs(2),
    }
}

fn missed() -> ClusterError {
    ClusterError::Compacted { oldest: Some(3) }
}

fn too_large() -> ClusterError {
    ClusterError::TooLarge {
        endpoint: "e".to_owned(),
        operation: "watch",
        reason: "too long".to_owned(),
    }
}

/// Every state, with `since` at this time.
fn states(since: Instant) -> Vec<State> {
    let (position, cluster_id) = (at(5), 7);
    vec![
        Starting,
        Empty,
        Inherited,
        FromDisk { cluster_id: 9 },
        FromMember { on_disk: None },
        FromMember { on_disk: Some(9) },
        Listed {
            position: position.clone(),
        },
        Watching {
            position: position.clone(),
        },
        Disconnected { position, since },
        MustRelist { cluster_id, since },
        DisconnectedMustRelist { cluster_id, since },
    ]
}

#[test]
fn the_first_state_is_by_what_there_is() {
    assert_eq!(State::start(true, true), Inherited);
    assert_eq!(State::start(false, true), Starting);
    assert_eq!(State::start(false, false), Empty);
}

#[test]
fn after_a_listing_a_watch_is_opened_from_its_revision() {
    let now = Instant::now();
    let reconnected = Some(News::Reconnected);
    let connected = Some(News::Connected);
    let news = [
        None, // Starting
        None, // Empty
        reconnected,
        connected,
        connected,
        connected,
        None, // Listed
        None, // Watching
        reconnected,
        None, // MustRelist: readers do not know.
        reconnected,
    ];
    for (state, news) in states(now).into_iter().zip(news) {
        let next = state.clone().next(Input::Listed(at(8)), now);
        assert_eq!(next, (Listed { position: at(8) }, news), "{state:?}");
        assert_eq!(next.0.watch_from(), Some(&at(8)));
        assert_eq!(
            (next.0.cluster_id(), next.0.silent_since()),
            (Some(7), None)
        );
    }
}

#[test]
fn a_failure_keeps_the_position_if_a_watch_can_continue() {
    let before = Instant::now();
    let now = before + Duration::from_secs(9);
    let disconnected = Some(News::Disconnected);
    let cluster_id = 7;
    for (state, error, next, news) in [
        // (state, failure, next state, news)
        (
            Listed { position: at(5) },
            away(),
            Disconnected {
                position: at(5),
                since: now,
            },
            disconnected,
        ),
        (
            Watching { position: at(5) },
            away(),
            Disconnected {
                position: at(5),
                since: now,
            },
            disconnected,
        ),
        (
            Listed { position: at(5) },
            missed(),
            MustRelist {
                cluster_id,
                since: now,
            },
            None,
        ),
        (
            Watching { position: at(5) },
            missed(),
            MustRelist {
                cluster_id,
                since: now,
            },
            None,
        ),
        (
            Watching { position: at(5) },
            too_large(),
            DisconnectedMustRelist {
                cluster_id,
                since: now,
            },
            disconnected,
        ),
        (
            Disconnected {
                position: at(5),
                since: before,
            },
            away(),
            Disconnected {
                position: at(5),
                since: before,
            },
            None,
        ),
        (
            Disconnected {
                position: at(5),
                since: before,
            },
            missed(),
            DisconnectedMustRelist {
                cluster_id,
                since: before,
            },
            None,
        ),
        (
            Disconnected {
                position: at(5),
                since: before,
            },
            too_large(),
            DisconnectedMustRelist {
                cluster_id,
                since: before,
            },
            None,
        ),
        (
            MustRelist {
                cluster_id,
                since: before,
            },
            missed(),
            MustRelist {
                cluster_id,
                since: before,
            },
            None,
        ),
        (
            MustRelist {
                cluster_id,
                since: before,
            },
            away(),
            DisconnectedMustRelist {
                cluster_id,
                since: before,
            },
            disconnected,
        ),
        (
            DisconnectedMustRelist {
                cluster_id,
                since: before,
            },
            missed(),
            DisconnectedMustRelist {
                cluster_id,
                since: before,
            },
            None,
        ),
    ] {
        let got = state.clone().next(Input::Failed(&error), now);
        assert_eq!(got, (next, news), "{state:?}: {error}");
    }
}

#[test]
fn a_failure_before_the_first_listing_changes_nothing() {
    let now = Instant::now();
    for state in states(now).into_iter().take(6) {
        for error in [away(), missed(), too_large()] {
            let next = state.clone().next(Input::Failed(&error), now);
            assert_eq!(next, (state.clone(), None), "{error}");
        }
        assert_eq!(state.watch_from(), None);
        assert_eq!((state.cluster_id(), state.silent_since()), (None, None));
    }
}

#[test]
fn a_watch_that_is_opened_ends_a_silence() {
    let now = Instant::now();
    let listed = Listed { position: at(5) };
    let watching = Watching { position: at(5) };
    let disconnected = Disconnected {
        position: at(5),
        since: now,
    };
    let opened = |state: State| state.next(Input::WatchOpened, now);
    assert_eq!(opened(listed), (watching.clone(), None));
    let news = Some(News::Reconnected);
    assert_eq!(opened(disconnected), (watching.clone(), news));

    let mut ended = watching;
    ended.advance(&at(11).ranges);
    let (ended, _) = ended.next(Input::Failed(&away()), now);
    assert_eq!(ended.watch_from(), Some(&at(11)), "where it ended");
}

#[test]
fn what_readers_see_before_the_first_listing() {
    let now = Instant::now();
    let file = Input::FileLoaded { cluster_id: 9 };
    let [loaded, borrowed] = [FromDisk { cluster_id: 9 }, FromMember { on_disk: None }];
    let after = Some(9);
    for (state, input, next) in [
        (Starting, file.clone(), loaded.clone()),
        (Starting, Input::FileRefused, Empty),
        (Starting, Input::MemberListed, borrowed.clone()),
        (Empty, Input::MemberListed, borrowed.clone()),
        (
            loaded.clone(),
            Input::MemberListed,
            FromMember { on_disk: after },
        ),
        (borrowed.clone(), Input::MemberListed, borrowed),
        // Read once at most.
        (Empty, file, Empty),
    ] {
        assert_eq!(state.next(input, now), (next, None));
    }
    assert_eq!(loaded.on_disk(), after);
    assert_eq!(FromMember { on_disk: after }.on_disk(), after);
    let lacking = states(now);
    let lacking = lacking
        .iter()
        .filter(|state| state.lacks_a_view_of_the_store());
    assert_eq!(lacking.count(), 5, "not where there is a view of the store");
}
