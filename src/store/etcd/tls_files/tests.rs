//! Tests of the checks of certificate files.

use super::*;

#[test]
fn invalid_files_are_named() {
    let directory = std::env::temp_dir().join(format!("pingora-etcd-tls-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let signed = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    let (one, other) = (signed("one"), signed("other"));
    let cert = file("cert.pem", &one.cert.pem());
    let key = file("key.pem", &one.signing_key.serialize_pem());
    let other_key = file("other.pem", &other.signing_key.serialize_pem());
    let whole = one.signing_key.serialize_pem();
    let half = file("half.pem", &whole[..whole.len() / 2]);
    let empty = file("empty.pem", "");

    let right = TlsOptions::new().ca_file(&cert).identity(&cert, &key);
    validate(&right).unwrap();
    let before = load(&right).unwrap().fingerprint();
    assert_eq!(before, load(&right).unwrap().fingerprint());
    assert_ne!(before, load(&TlsOptions::new()).unwrap().fingerprint());

    let missing = directory.join("missing.pem");
    for (tls, field, path) in [
        (right.clone().ca_file(&missing), "tls.ca_file", &missing),
        (right.clone().ca_file(&empty), "tls.ca_file", &empty),
        (
            right.clone().identity(&empty, &key),
            "tls.cert_file",
            &empty,
        ),
        (right.clone().identity(&cert, &half), "tls.key_file", &half),
        (
            right.clone().identity(&cert, &other_key),
            "tls.key_file",
            &cert,
        ),
    ] {
        let error = validate(&tls).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
    }
    let mut lonely = right.clone();
    lonely.key_file = None;
    let error = validate(&lonely).unwrap_err().to_string();
    assert!(error.contains("tls.key_file"), "{error}");
    let error = validate(&right.server_name("not a name")).unwrap_err();
    assert!(error.to_string().contains("tls.server_name"), "{error}");
    std::fs::remove_dir_all(&directory).unwrap();
}
