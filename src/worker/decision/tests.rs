use std::collections::VecDeque;

use super::*;
use crate::worker::request::{Request, Wanted};

const OWN_LEASE: LeaseId = LeaseId(7);

static NO_LEASES: VecDeque<LeaseId> = VecDeque::new();

fn entry(key: &str, value: &str, create_revision: Revision, lease: i64) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.as_bytes().to_vec(),
        create_revision,
        mod_revision: create_revision,
        lease: Some(LeaseId(lease)),
    }
}

/// Its own entry, and its own candidacy that was created at this revision.
fn registered() -> Option<Entry> {
    Some(entry("r/n", "{}", 5, 7))
}

fn candidacy(created: Revision) -> Entry {
    entry("e/7", "n", created, 7)
}

fn own() -> OwnFacts<'static> {
    OwnFacts {
        id: "n",
        lease: OWN_LEASE,
        candidacy_key: "e/7",
        priority: 0,
        own_leases: &NO_LEASES,
        was_registered: false,
        abandoned: 0,
        passed_over: None,
        is_draining: false,
        is_entry_current: true,
    }
}

fn read(registration: Option<Entry>, candidates: &[Entry], requests: &[Request]) -> Reading {
    Reading {
        registration,
        candidates: candidates.to_vec(),
        requests: requests.to_vec(),
        ..Reading::default()
    }
}

fn request(from: i64, to: &str, created: Revision, priority: Option<u16>) -> Request {
    Request {
        is_by_operator: false,
        from: LeaseId(from),
        wanted: Wanted {
            to: to.to_owned(),
            created,
            priority,
        },
    }
}

fn enter(register: bool, campaign: bool) -> Action {
    Action::Enter { register, campaign }
}

fn follow(ahead: &str) -> Action {
    Action::Follow {
        ahead: ahead.to_owned(),
    }
}

/// Each case: what it is, what is registered, the candidates, the node itself, and the action.
type Case<'a> = (
    &'a str,
    Option<Entry>,
    Vec<Entry>,
    OwnFacts<'static>,
    Action,
);

fn check(cases: Vec<Case<'_>>) {
    for (what, registration, candidates, own, action) in cases {
        let reading = read(registration, &candidates, &[]);
        assert_eq!(decide(&reading, &own), action, "{what}");
    }
}

#[test]
fn a_node_enters_what_is_missing_and_waits_behind_the_one_ahead() {
    let queue = [
        entry("e/9", "a", 2, 9),
        entry("e/8", "b", 4, 8),
        candidacy(6),
        entry("e/6", "c", 8, 6),
    ];
    let outdated = OwnFacts {
        is_entry_current: false,
        ..own()
    };
    check(vec![
        ("nothing is there", None, vec![], own(), enter(true, true)),
        (
            "no candidacy",
            registered(),
            vec![],
            own(),
            enter(false, true),
        ),
        (
            "no registration: it must not lead without one",
            None,
            vec![candidacy(6)],
            own(),
            enter(true, false),
        ),
        (
            "the entry of a node that ended under the same lease",
            registered(),
            vec![candidacy(6)],
            outdated,
            enter(true, false),
        ),
        (
            "two ahead",
            registered(),
            queue.to_vec(),
            own(),
            follow("e/8"),
        ),
        (
            "least create revision",
            registered(),
            queue[2..].to_vec(),
            own(),
            Action::Lead { epoch: 6 },
        ),
    ]);
}

#[test]
fn a_starting_process_takes_over_and_a_replaced_one_stands_back() {
    static EARLIER: std::sync::LazyLock<VecDeque<LeaseId>> =
        std::sync::LazyLock::new(|| VecDeque::from([LeaseId(3), OWN_LEASE]));
    let other = || Some(entry("r/n", "{}", 5, 3));
    let by_hand = Some(Entry {
        lease: None,
        ..entry("r/n", "{}", 5, 3)
    });
    let replaced = || OwnFacts {
        was_registered: true,
        ..own()
    };
    let stand_back = |candidacy| Action::StandBack {
        by: LeaseId(3),
        candidacy,
    };
    check(vec![
        ("it starts", other(), vec![], own(), enter(true, true)),
        (
            "it was registered before",
            other(),
            vec![],
            replaced(),
            stand_back(None),
        ),
        (
            "and is still a candidate",
            other(),
            vec![candidacy(6)],
            replaced(),
            stand_back(Some(6)),
        ),
        (
            "under an earlier lease of its own, which has not expired yet",
            other(),
            vec![],
            OwnFacts {
                own_leases: &EARLIER,
                ..replaced()
            },
            enter(true, true),
        ),
        (
            "without a lease: no process lives there",
            by_hand,
            vec![],
            replaced(),
            enter(true, true),
        ),
    ]);
}

#[test]
fn a_candidacy_that_was_given_up_never_leads() {
    let resigned = || OwnFacts {
        abandoned: 6,
        ..own()
    };
    let withdraw = || Action::Withdraw { candidacy: 6 };
    check(vec![
        (
            "given up",
            registered(),
            vec![candidacy(6)],
            resigned(),
            withdraw(),
        ),
        (
            "of another node that has ended, under the shared lease",
            registered(),
            vec![entry("e/7", "other", 6, 7)],
            own(),
            withdraw(),
        ),
        (
            "a later one",
            registered(),
            vec![candidacy(8)],
            resigned(),
            Action::Lead { epoch: 8 },
        ),
    ]);
}

#[test]
fn a_draining_node_announces_it_and_leaves_the_election() {
    let draining = || OwnFacts {
        is_draining: true,
        ..own()
    };
    let serving = || Some(entry("r/n", r#"{"id":"n","ip":"::1"}"#, 5, 7));
    let announced = || {
        let value = r#"{"id":"n","ip":"::1","state":"draining"}"#;
        Some(entry("r/n", value, 5, 7))
    };
    let announce = |candidacy| Action::AnnounceDraining { candidacy };
    check(vec![
        (
            "not registered",
            None,
            vec![],
            draining(),
            enter(true, false),
        ),
        (
            "not announced",
            serving(),
            vec![],
            draining(),
            announce(None),
        ),
        (
            "still a candidate",
            announced(),
            vec![candidacy(6)],
            draining(),
            announce(Some(6)),
        ),
        ("done", announced(), vec![], draining(), Action::StayDrained),
    ]);
}

#[test]
fn a_candidate_makes_way_for_a_higher_priority_or_on_request_of_the_leader_only() {
    let queue = [
        entry("e/9", "leader", 2, 9),
        candidacy(6),
        entry("e/8", "target", 8, 8),
    ];
    let make_way = || Action::MakeWay { candidacy: 6 };
    for (what, request, action) in [
        ("higher", request(8, "e/8", 8, Some(1)), make_way()),
        ("equal", request(8, "e/8", 8, Some(0)), follow("e/9")),
        ("by the leader", request(9, "e/8", 8, None), make_way()),
        ("by a third", request(7, "e/8", 8, None), follow("e/9")),
        (
            "a priority on behalf of another",
            request(9, "e/8", 8, Some(1)),
            follow("e/9"),
        ),
        (
            "for a candidate that is ahead anyway",
            request(9, "e/9", 2, Some(9)),
            follow("e/9"),
        ),
    ] {
        let reading = read(registered(), &queue, &[request]);
        assert_eq!(decide(&reading, &own()), action, "{what}");
    }
}

#[test]
fn a_leader_hands_over_to_a_higher_priority_once_that_is_next() {
    let queue = [
        candidacy(6),
        entry("e/8", "a", 8, 8),
        entry("e/9", "b", 9, 9),
    ];
    let lead = || Action::Lead { epoch: 6 };
    let equal = OwnFacts {
        priority: 1,
        ..own()
    };
    for (what, request, own, action) in [
        ("not next yet", request(9, "e/9", 9, Some(1)), own(), lead()),
        (
            "next",
            request(8, "e/8", 8, Some(1)),
            own(),
            Action::HandOver {
                epoch: 6,
                to: queue[1].clone(),
            },
        ),
        // The transfer that has made this request carries it out itself.
        ("its own request", request(7, "e/8", 8, None), own(), lead()),
        ("equal", request(8, "e/8", 8, Some(1)), equal, lead()),
    ] {
        let reading = read(registered(), &queue, &[request]);
        assert_eq!(decide(&reading, &own), action, "{what}");
    }
}
