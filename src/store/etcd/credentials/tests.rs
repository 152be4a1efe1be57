//! Tests of reading passwords, and of hiding them.

use super::*;

#[test]
fn a_password_is_read_each_time_and_never_shown() {
    let file = std::env::temp_dir().join(format!("pingora-etcd-{}", std::process::id()));
    let password = Password::File(file.clone());
    let error = password.read().unwrap_err().to_string();
    assert!(error.contains("password_file"), "{error}");
    assert!(error.contains(&*file.to_string_lossy()), "{error}");
    for (text, read) in [("one\n", "one"), ("two \r\n", "two "), ("a\nb", "a\nb")] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(password.read().unwrap(), read);
    }
    for (bytes, why) in [(&b"\n"[..], "is empty"), (&b"\xff"[..], "is not UTF-8")] {
        std::fs::write(&file, bytes).unwrap();
        let error = password.read().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    std::fs::remove_file(&file).unwrap();

    let unset = Password::Env("PINGORA_ETCD_NO_SUCH_VARIABLE".to_owned());
    let error = unset.read().unwrap_err().to_string();
    assert!(error.contains("PINGORA_ETCD_NO_SUCH_VARIABLE"), "{error}");
    assert!(Password::Env(String::new()).read().is_err());
    assert!(Password::Text(String::new()).read().is_err());

    let text = Credentials::new("u", Password::Text("hunter2".to_owned()));
    assert!(!format!("{text:?} {text:#?}").contains("hunter2"));
    assert!(Credentials::new("", text.password).validate().is_err());
}

#[test]
fn a_user_of_a_file_goes_with_exactly_one_password() {
    let user = || Some("u".to_owned());
    let text = || Password::Text("p".to_owned());
    assert_eq!(Credentials::from_fields(None, []), None);
    let right = Credentials::from_fields(user(), [text()]);
    assert_eq!(right, Some(Credentials::new("u", text())));
    for (user, passwords) in [
        (None, vec![text()]),
        (user(), vec![]),
        (user(), vec![text(), text()]),
    ] {
        let wrong = Credentials::from_fields(user, passwords).unwrap();
        let error = wrong.validate().unwrap_err().to_string();
        assert!(error.starts_with("invalid user: "), "{error}");
    }
}
