//! Tests of the classification of failed calls.

use super::*;
use crate::store::Credentials;
use crate::store::Password;

fn explained(error: &CallError, options: &EtcdOptions) -> ClusterError {
    let context = CallContext {
        operation: "list",
        endpoint: "e",
        subject: Subject {
            keys: &["registry/app/"],
            lease: Some(LeaseId(7)),
        },
    };
    error.explain(&context, options)
}

fn of_status(code: Code, text: &str) -> CallError {
    EtcdError::GRpcStatus(Status::new(code, text)).into()
}

#[test]
fn refusals_of_the_user() {
    let options = EtcdOptions::new(["h:1"]);
    for (text, part) in [
        ("etcdserver: permission denied", "allows list"),
        (
            "etcdserver: authentication failed, invalid user ID or password",
            "wrong user or password",
        ),
        ("etcdserver: authentication is not enabled", "not enabled"),
        ("etcdserver: user name is empty", "none are given"),
        ("etcdserver: user name not found", "knows no such user"),
        ("etcdserver: invalid auth token", "invalid auth token"),
    ] {
        // With any code, as from a proxy.
        let error = explained(&of_status(Code::Unknown, text), &options);
        assert!(error.to_string().contains(part), "{text}: {error}");
    }
    for text in [
        "etcdserver: invalid auth token",
        "etcdserver: revision of auth store is old",
        "auth: revision in header is old",
        "etcdserver: user name is empty",
    ] {
        assert!(of_status(Code::InvalidArgument, text).is_token_refused());
    }
    // A proxy's own refusal is no refusal by etcd's users and roles: the next endpoint is tried.
    assert!(!of_status(Code::Unauthenticated, "jwt is missing").is_token_refused());
    let of_proxy = of_status(Code::PermissionDenied, "RBAC: access denied");
    assert!(!of_proxy.is_permission_denied());
    let shown = explained(&of_proxy, &options).to_string();
    assert!(shown.contains("RBAC: access denied"), "{shown}");
    assert_eq!(
        Failure::of_message("etcdserver: mvcc: database space exceeded"),
        None
    );
}

#[test]
fn the_user_is_named_once() {
    let credentials = Credentials::new("u", Password::Text("p".to_owned()));
    let options = EtcdOptions::new(["h:1"]).credentials(credentials);
    let wrong = of_status(Code::InvalidArgument, "invalid user ID or password");
    assert_eq!(
        explained(&wrong, &options).to_string(),
        "etcd at e does not accept the user: wrong user or password (user \"u\")"
    );
    let denied = explained(
        &of_status(Code::PermissionDenied, "etcdserver: permission denied"),
        &options,
    )
    .to_string();
    assert!(
        denied.ends_with("no role of user \"u\" allows list of registry/app/"),
        "{denied}"
    );
}

#[test]
fn a_status_is_classified_by_its_code() {
    let options = EtcdOptions::new(["h:1"]);
    let of = |code, text: &str| explained(&of_status(code, text), &options);
    assert!(matches!(
        of(Code::ResourceExhausted, "etcdserver: too many requests"),
        ClusterError::Exhausted { .. }
    ));
    assert!(matches!(
        of(Code::DeadlineExceeded, ""),
        ClusterError::Timeout { after, .. } if after == Duration::from_secs(3)
    ));
    assert!(matches!(
        of(Code::InvalidArgument, "etcdserver: duplicate key given"),
        ClusterError::Rejected { .. }
    ));
    // Whoever has to mend it needs the key.
    let large = of(Code::InvalidArgument, "etcdserver: request is too large").to_string();
    assert!(
        large.ends_with("request is too large (registry/app/)"),
        "{large}"
    );
    assert!(matches!(
        of(Code::OutOfRange, "Error, decoded message length too large"),
        ClusterError::TooLarge { .. }
    ));
    assert_eq!(
        of(
            Code::OutOfRange,
            "etcdserver: mvcc: required revision has been compacted"
        ),
        ClusterError::Compacted { oldest: None }
    );
    assert_eq!(
        of(Code::NotFound, "etcdserver: requested lease not found"),
        ClusterError::LeaseNotFound { lease: LeaseId(7) }
    );
    // Another member accepts it.
    let learner = of(
        Code::FailedPrecondition,
        "etcdserver: rpc not supported for learner",
    );
    assert!(learner.is_transient());
    assert!(of(Code::Unavailable, "etcdserver: no leader").is_transient());
    let error = of_status(Code::Unavailable, "etcdserver: no leader");
    assert!(error.blames_connection() && error.source().is_some());
}
