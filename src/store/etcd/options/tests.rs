//! Tests of the options' checks and of their form in a file.

use super::*;

#[test]
fn wrong_endpoints_are_named() {
    for endpoint in [
        "",
        "http://",
        "http://host",
        "host",
        "ftp://host:1",
        "https://host",
        "http://host:2379/path",
        "http://host:99999",
        "http://ho st:2379",
    ] {
        let error = EtcdOptions::new([endpoint]).validate().unwrap_err();
        assert!(
            matches!(&error, ClusterError::InvalidEndpoint { endpoint: named, .. } if named == endpoint),
            "{endpoint:?}: {error:?}"
        );
    }
    assert!(
        EtcdOptions::new(["http://a:1", "memory://b"])
            .validate()
            .is_err()
    );
    let none: [&str; 0] = [];
    let error = EtcdOptions::new(none).validate().unwrap_err();
    assert!(error.to_string().contains("endpoints"));
}

#[test]
fn a_password_in_an_endpoint_is_refused_and_shown_nowhere() {
    for (endpoint, shown) in [
        ("http://root:s3cret@host:2379", "http://...@host:2379"),
        ("https://root:s3cret@host:2379", "https://...@host:2379"),
        ("http://root:p@s3cret@host:2379", "http://...@host:2379"),
        ("http://root:s3cret/?#@host:2379", "http://...@host:2379"),
        ("root:s3cret@host:2379", "...@host:2379"),
        ("s3cret://x@host:2379", "...@host:2379"),
        ("http://root:s3cret@", "http://...@"),
        ("http://root:s3cret@ho st", "http://...@ho st"),
        ("http:/root:s3cret@host", "...@host"),
        ("http://host:2379?p=s3cret", "http://host:2379?..."),
        ("http://x@host:2379/?p=s3cret", "http://...@host:2379/?..."),
    ] {
        let options = EtcdOptions::new(["http://a:1", endpoint]);
        let error = options.validate().unwrap_err();
        assert!(
            matches!(&error, ClusterError::InvalidEndpoint { endpoint, .. } if endpoint == shown),
            "{error:?}"
        );
        let told = format!(
            "{error} {error:?} {options:?} {options:#?} {}",
            options.named()
        );
        assert!(!told.contains("s3cret"), "{told}");
    }
    let error = EtcdOptions::new(["http://u:p@h:1"]).validate();
    let error = error.unwrap_err().to_string();
    assert!(error.contains("credentials"), "{error}");
    // A name, not a user.
    EtcdOptions::memory("a@b").validate().unwrap();
}

#[test]
fn a_key_prefix_ends_with_a_slash() {
    for (given, prefix) in [
        ("", ""),
        ("prod", "prod/"),
        ("prod/", "prod/"),
        ("/prod", "/prod/"),
        ("/", "/"),
        ("a/b c", "a/b c/"),
    ] {
        let mut options = EtcdOptions::memory("").key_prefix(given);
        options.validate().unwrap();
        assert_eq!(options.prefix(), prefix);
        options = EtcdOptions::memory("");
        options.key_prefix = given.to_owned();
        assert_eq!(options.prefix(), prefix);
    }
    let long = "x".repeat(513);
    for wrong in [
        " ", "\t", "prod//", "//", "a//b", " prod", "prod ", "a\n", &long,
    ] {
        let error = EtcdOptions::memory("").key_prefix(wrong).validate();
        let error = error.unwrap_err().to_string();
        assert!(error.contains("key_prefix"), "{wrong:?}: {error}");
    }
}

#[test]
fn right_ones_pass() {
    for endpoint in [
        "http://127.0.0.1:2379",
        "localhost:2379",
        "http://[::1]:2379",
        "memory://",
        "memory://demo",
    ] {
        EtcdOptions::new([endpoint]).validate().unwrap();
    }
}

#[test]
fn https_needs_the_feature_and_tls_needs_https() {
    let https = EtcdOptions::new(["https://host:2379"]).validate();
    assert_eq!(https.is_ok(), cfg!(feature = "tls"), "{https:?}");
    let plain = EtcdOptions::new(["http://host:2379"]).tls(TlsOptions::new());
    let error = plain.validate().unwrap_err().to_string();
    assert!(error.contains("http://host:2379"), "{error}");
    let bare = EtcdOptions::new(["host:2379"]).tls(TlsOptions::new());
    assert_eq!(bare.validate().is_ok(), cfg!(feature = "tls"));
}

#[test]
fn out_of_range_times_are_named() {
    let options = EtcdOptions::new(["h:1"]).keep_alive_interval(Duration::from_secs(1));
    let error = options.validate().unwrap_err().to_string();
    assert!(error.contains("keep_alive_interval"), "{error}");
}

#[cfg(not(feature = "tls"))]
#[test]
fn without_the_feature_tls_is_refused() {
    let options = EtcdOptions::new(["host:2379"]).tls(TlsOptions::new());
    let error = options.validate().unwrap_err().to_string();
    assert!(error.contains("feature \"tls\""), "{error}");
}

#[cfg(feature = "config")]
#[test]
fn a_file_has_the_same_fields_and_defaults() {
    let read = |text: &str| serde_saphyr::from_str::<EtcdOptions>(text);
    let least = read("endpoints: ['h:1']").unwrap();
    assert_eq!(least, EtcdOptions::new(["h:1"]));
    let options = read("{ endpoints: ['h:1'], request_timeout_ms: 1500, user: u, password: p }");
    let expected = EtcdOptions::new(["h:1"])
        .request_timeout(Duration::from_millis(1500))
        .credentials(Credentials::new("u", Password::Text("p".to_owned())));
    assert_eq!(options.unwrap(), expected);
    let error = read("{ endpoints: ['h:1'], timeout: 1 }").unwrap_err();
    assert!(error.to_string().contains("timeout"), "{error}");
    let without = read("key_prefix: x").unwrap_err().to_string();
    assert!(without.contains("endpoints"), "{without}");
}
