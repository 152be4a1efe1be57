//! Certificate authorities, and certificates signed by them, in a directory that belongs to one
//! test.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SignatureAlgorithm, date_time_ymd,
};

/// A directory that is removed when its handle is dropped.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("files-{}-{count}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Writes the pair as `{name}.pem` and `{name}.key`.
    pub fn write_pair(&self, name: &str, pair: &Pair) -> (PathBuf, PathBuf) {
        let cert = self.write(&format!("{name}.pem"), &pair.cert);
        let key = self.write(&format!("{name}.key"), &pair.key);
        (cert, key)
    }

    /// Replaces all files at once, as Kubernetes updates a mounted secret: each file is a symbolic
    /// link through `..data`, which is itself a symbolic link and is replaced atomically.
    pub fn swap(&self, files: &[(&str, &str)]) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let target = format!("..{}", COUNT.fetch_add(1, Ordering::Relaxed));
        std::fs::create_dir(self.file(&target)).unwrap();
        for (name, text) in files {
            std::fs::write(self.file(&target).join(name), text).unwrap();
        }
        let (fresh, data) = (self.file("..data_tmp"), self.file("..data"));
        std::os::unix::fs::symlink(&target, &fresh).unwrap();
        std::fs::rename(&fresh, &data).unwrap();
        for (name, _) in files {
            let link = self.file(name);
            if !link.is_symlink() {
                std::os::unix::fs::symlink(Path::new("..data").join(name), link).unwrap();
            }
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

pub struct Pair {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            pem,
            issuer: Issuer::new(params, key),
        }
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A server certificate for these names and addresses.
    pub fn server(&self, names: &[&str]) -> Pair {
        self.sign(names, "etcd", 4000, &PKCS_ECDSA_P256_SHA256)
    }

    /// A server certificate with a key that few clients know.
    pub fn ed25519_server(&self, names: &[&str]) -> Pair {
        self.sign(names, "etcd", 4000, &PKCS_ED25519)
    }

    /// A server certificate that has expired.
    pub fn expired_server(&self, names: &[&str]) -> Pair {
        self.sign(names, "etcd", 2020, &PKCS_ECDSA_P256_SHA256)
    }

    /// A client certificate for the etcd user `name`.
    pub fn client(&self, name: &str) -> Pair {
        self.sign(&[], name, 4000, &PKCS_ECDSA_P256_SHA256)
    }

    fn sign(
        &self,
        names: &[&str],
        common_name: &str,
        until: i32,
        kind: &'static SignatureAlgorithm,
    ) -> Pair {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, common_name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // etcd's HTTP gateway connects to its own server as a client, with the server's
        // certificate.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let key = KeyPair::generate_for(kind).unwrap();
        Pair {
            cert: params.signed_by(&key, &self.issuer).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}
