//! TLS to etcd, and the user to it: what can be set, and the files it comes from.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::ClusterError;

/// TLS to etcd, for `https://` endpoints and for those without a scheme. Needs the feature `tls`.
///
/// The files are PEM. They are read for every connection, and looked at every 3 s while one is
/// open: when they have changed and make sense, a connection with the new ones is made and takes
/// the place of the old one, without a restart. New files that make no sense, or with which etcd
/// cannot be reached, are told once in the log and leave the old connection alone.
///
/// ```
/// use pingora_etcd::{EtcdOptions, store::TlsOptions};
/// let tls = TlsOptions::new()
///     .ca_file("/etc/etcd/ca.pem")
///     .identity("/etc/etcd/balancer.pem", "/etc/etcd/balancer.key");
/// let options = EtcdOptions::new(["https://10.0.0.1:2379"]).tls(tls);
/// // The files are not there.
/// # #[cfg(feature = "tls")]
/// assert!(options.validate().unwrap_err().to_string().contains("tls.ca_file"));
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct TlsOptions {
    /// The certificates of the CAs that may have signed etcd's. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// This client's own certificate, and the ones between it and the CA, for an etcd that wants
    /// one (`--client-cert-auth`). Goes with `key_file`. Default: none.
    pub cert_file: Option<PathBuf>,
    /// The private key of `cert_file`. Default: none.
    pub key_file: Option<PathBuf>,
    /// The name that etcd's certificate has to be for. Default: the host of the endpoint.
    pub server_name: Option<String>,
}

impl TlsOptions {
    /// Every default: the system's CAs, no certificate of one's own.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`ca_file`](Self::ca_file).
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(file.into());
        self
    }

    /// Sets [`cert_file`](Self::cert_file) and [`key_file`](Self::key_file).
    #[must_use]
    pub fn identity(mut self, cert: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(cert.into());
        self.key_file = Some(key.into());
        self
    }

    /// Sets [`server_name`](Self::server_name).
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Checks that the files are there and make sense.
    pub(crate) fn validate(&self) -> Result<(), ClusterError> {
        match (&self.cert_file, &self.key_file) {
            (Some(_), None) => return Err(config("tls.key_file", "goes with tls.cert_file")),
            (None, Some(_)) => return Err(config("tls.cert_file", "goes with tls.key_file")),
            _ => {}
        }
        #[cfg(feature = "tls")]
        return self.load().map(drop);
        #[cfg(not(feature = "tls"))]
        return Err(config("tls", NEEDS_FEATURE));
    }
}

/// Why there is no TLS.
#[cfg(not(feature = "tls"))]
pub(crate) const NEEDS_FEATURE: &str = "TLS needs the feature \"tls\" of pingora-etcd";

fn config(field: &str, reason: impl Into<String>) -> ClusterError {
    ClusterError::config(field, reason)
}

fn read(field: &str, path: &Path) -> Result<Vec<u8>, ClusterError> {
    std::fs::read(path).map_err(|error| config(field, format!("{}: {error}", path.display())))
}

/// The contents of the files.
#[cfg(feature = "tls")]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    pub(crate) ca: Option<Vec<u8>>,
    /// Certificate and key.
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
}

#[cfg(feature = "tls")]
impl TlsFiles {
    /// Tells contents apart, without keeping a key in memory for it.
    pub(crate) fn fingerprint(&self) -> u128 {
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        let identity = self.identity.as_ref();
        let cert = identity.map(|(cert, _)| cert);
        let key = identity.map(|(_, key)| key);
        for part in [self.ca.as_ref(), cert, key] {
            let part = part.map_or(&[][..], Vec::as_slice);
            hasher.update(&part.len().to_le_bytes());
            hasher.update(part);
        }
        hasher.digest128()
    }
}

#[cfg(feature = "tls")]
impl TlsOptions {
    /// Whether there is a file that can change.
    pub(crate) fn has_files(&self) -> bool {
        self.ca_file.is_some() || self.cert_file.is_some()
    }

    /// Reads the files as they are, whatever is in them. Blocks.
    pub(crate) fn read(&self) -> Result<TlsFiles, ClusterError> {
        let read_all = |field, path: &Option<PathBuf>| match path {
            Some(path) => read(field, path).map(Some),
            None => Ok(None),
        };
        let ca = read_all("tls.ca_file", &self.ca_file)?;
        let cert = read_all("tls.cert_file", &self.cert_file)?;
        let key = read_all("tls.key_file", &self.key_file)?;
        Ok(TlsFiles {
            ca,
            identity: cert.zip(key),
        })
    }

    /// Reads the files and makes sure that they can be used. Blocks.
    pub(crate) fn load(&self) -> Result<TlsFiles, ClusterError> {
        let files = self.read()?;
        self.check(&files)?;
        Ok(files)
    }

    /// Makes sure that these contents can be used. Answers with what a client would use; without
    /// a CA file it trusts nobody.
    pub(crate) fn check(&self, files: &TlsFiles) -> Result<rustls::ClientConfig, ClusterError> {
        use rustls::crypto::{CryptoProvider, ring};
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
        use rustls::{ClientConfig, Error, InconsistentKeys, RootCertStore};

        // The TLS client's own choice.
        let provider = match CryptoProvider::get_default() {
            Some(provider) => provider.clone(),
            None => std::sync::Arc::new(ring::default_provider()),
        };

        let at = |path: &Option<PathBuf>, reason: &str| {
            let path = path.as_deref().unwrap_or(Path::new(""));
            format!("{}: {reason}", path.display())
        };
        // Errors of the PEM parser are not passed on: they may show a line of a key.
        let certificates = |field, path: &Option<PathBuf>, pem: &[u8]| {
            let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
            match all {
                Ok(all) if !all.is_empty() => Ok(all),
                Ok(_) => Err(config(field, at(path, "there is no PEM certificate in it"))),
                Err(_) => Err(config(field, at(path, "is not a complete PEM file"))),
            }
        };
        let mut roots = RootCertStore::empty();
        if let Some(ca) = &files.ca {
            let all = certificates("tls.ca_file", &self.ca_file, ca)?;
            // As the TLS client does: a bundle may hold some that it does not understand.
            let (usable, _) = roots.add_parsable_certificates(all);
            if usable == 0 {
                let reason = at(&self.ca_file, "there is no usable certificate in it");
                return Err(config("tls.ca_file", reason));
            }
        }
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| config("tls", error.to_string()))?
            .with_root_certificates(roots);
        let client = match &files.identity {
            None => client.with_no_client_auth(),
            Some((cert, key)) => {
                let chain = certificates("tls.cert_file", &self.cert_file, cert)?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
                    let reason = "there is no complete PEM private key in it";
                    config("tls.key_file", at(&self.key_file, reason))
                })?;
                client.with_client_auth_cert(chain, key).map_err(|error| {
                    let reason = match error {
                        Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                            let cert = self.cert_file.as_deref().unwrap_or(Path::new(""));
                            format!("is not the key of the certificate in {}", cert.display())
                        }
                        other => other.to_string(),
                    };
                    config("tls.key_file", at(&self.key_file, &reason))
                })?
            }
        };
        if let Some(name) = &self.server_name
            && ServerName::try_from(name.as_str()).is_err()
        {
            let reason = format!("{name:?} is neither a host name nor an IP address");
            return Err(config("tls.server_name", reason));
        }
        Ok(client)
    }
}

/// The user that etcd is asked as.
///
/// The password is read at each authentication, so a file or variable that changes needs no
/// restart; while it cannot be read, the last one is tried. It appears in no log, no error and no `Debug`. Over `http://` it is sent in the open:
/// use TLS beside it.
///
/// ```
/// use pingora_etcd::{EtcdOptions, store::{Credentials, Password}};
/// let credentials = Credentials::new("balancer", Password::Text("secret".to_owned()));
/// let options = EtcdOptions::new(["http://10.0.0.1:2379"]).credentials(credentials);
/// assert!(!format!("{options:?}").contains("secret"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// The user's name in etcd.
    pub user: String,
    /// Where the password comes from.
    pub password: Password,
}

/// Where a password comes from.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Password {
    /// It is this.
    Text(String),
    /// It is the text of this file, without the end of its last line.
    File(PathBuf),
    /// It is the value of this environment variable.
    Env(String),
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(_) => f.write_str("Text(..)"),
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Env(name) => f.debug_tuple("Env").field(name).finish(),
        }
    }
}

impl Credentials {
    /// This user with this password.
    pub fn new(user: impl Into<String>, password: Password) -> Self {
        Self {
            user: user.into(),
            password,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), ClusterError> {
        if self.user.is_empty() {
            return Err(config("user", "must not be empty"));
        }
        self.password.read().map(drop)
    }
}

impl Password {
    /// The password of now. Blocks.
    pub(crate) fn read(&self) -> Result<String, ClusterError> {
        let (field, of, password) = match self {
            Self::Text(text) => ("password", String::new(), text.clone()),
            Self::File(path) => {
                let field = "password_file";
                let of = format!("{}: ", path.display());
                let text = String::from_utf8(read(field, path)?)
                    .map_err(|_| config(field, format!("{of}is not UTF-8")))?;
                let line = text.strip_suffix('\n').unwrap_or(&text);
                let line = line.strip_suffix('\r').unwrap_or(line);
                (field, of, line.to_owned())
            }
            Self::Env(name) => {
                let field = "password_env";
                let of = format!("the environment variable {name:?} ");
                // `var` panics on no name, its error shows what is not UTF-8.
                let value = std::env::var_os(name)
                    .ok_or_else(|| config(field, format!("{of}is not set")))?;
                let value = value
                    .into_string()
                    .map_err(|_| config(field, format!("{of}is not UTF-8")))?;
                (field, of, value)
            }
        };
        if password.is_empty() {
            return Err(config(field, format!("{of}is empty")));
        }
        Ok(password)
    }
}

#[cfg(test)]
mod tests {
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

    #[cfg(not(feature = "tls"))]
    #[test]
    fn without_the_feature_it_is_named() {
        let error = TlsOptions::new().validate().unwrap_err().to_string();
        assert!(error.contains("feature \"tls\""), "{error}");
    }

    #[cfg(feature = "tls")]
    #[test]
    fn files_that_make_no_sense_are_named() {
        let directory =
            std::env::temp_dir().join(format!("pingora-etcd-tls-{}", std::process::id()));
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
        right.validate().unwrap();
        let before = right.load().unwrap().fingerprint();
        assert_eq!(before, right.load().unwrap().fingerprint());
        assert_ne!(before, TlsOptions::new().load().unwrap().fingerprint());

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
            let error = tls.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
            assert!(error.contains(&*path.to_string_lossy()), "{error}");
        }
        let mut lonely = right.clone();
        lonely.key_file = None;
        let error = lonely.validate().unwrap_err().to_string();
        assert!(error.contains("tls.key_file"), "{error}");
        let error = right.server_name("not a name").validate().unwrap_err();
        assert!(error.to_string().contains("tls.server_name"), "{error}");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
