//! What is shown of certificate files.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::files::{Check, Named, read};
use crate::pem::certificates;
use crate::proxy::CertificateFile;

/// What there is to know of these files; those without a certificate, such as keys, are not among them.
pub(super) fn shown(files: &[Named], contents: &[Vec<u8>]) -> Vec<CertificateFile> {
    let files = files.iter().zip(contents);
    files.filter_map(|(file, pem)| of(file, pem)).collect()
}

/// When the certificates that this process shows end: of each file that is none of CAs, the first one.
pub(super) fn ends(files: &[Named], contents: &[Vec<u8>]) -> Vec<SystemTime> {
    let files = files.iter().zip(contents);
    let own = files.filter(|(file, _)| !file.field.ends_with("ca_file"));
    let first = |(file, pem): (&Named, &Vec<u8>)| {
        let all = certificates(&file.field, &file.path, pem).ok()?;
        let (_, first) = x509_parser::parse_x509_certificate(all.first()?).ok()?;
        Some(time(first.validity().not_after.timestamp()))
    };
    own.filter_map(first).collect()
}

fn of(file: &Named, pem: &[u8]) -> Option<CertificateFile> {
    let all = certificates(&file.field, &file.path, pem).ok()?;
    let read = |der: &CertificateDer| {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let ends = certificate.validity().not_after.timestamp();
        Some((names_of(&certificate), time(ends)))
    };
    // A bundle may contain some that are not understood.
    let read = all.iter().filter_map(read);
    // Of a chain each one is needed; among CAs there may be some that nobody uses any more.
    let (names, ends) = match file.field.ends_with("ca_file") {
        true => read.max_by_key(|(_, ends)| *ends)?,
        false => read.min_by_key(|(_, ends)| *ends)?,
    };
    Some(CertificateFile {
        field: file.field.clone(),
        file: file.path.clone(),
        names,
        ends,
    })
}

fn names_of(certificate: &X509Certificate) -> Vec<String> {
    let extension = certificate.subject_alternative_name().ok().flatten();
    let named = extension
        .iter()
        .flat_map(|names| &names.value.general_names);
    let named = named.filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes),
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    });
    let named: Vec<_> = named.collect();
    match named.is_empty() {
        true => vec![certificate.subject().to_string()],
        false => named,
    }
}

fn address(bytes: &[u8]) -> Option<String> {
    let of_4 = <[u8; 4]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    let of_16 = <[u8; 16]>::try_from(bytes).map(|bytes| std::net::IpAddr::from(bytes).to_string());
    of_4.or(of_16).ok()
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// A file that somebody else uses, and reads again.
pub(super) struct Watched {
    file: [Named; 1],
    shown: ArcSwap<Vec<CertificateFile>>,
}

impl Watched {
    /// A file, and the field that names it.
    pub(super) fn of(field: &str, path: &Path) -> Arc<dyn Check> {
        let watched = Self {
            file: [Named::new(field, path)],
            shown: ArcSwap::default(),
        };
        watched.check_files();
        Arc::new(watched)
    }
}

impl Check for Watched {
    fn check_files(&self) {
        // While it cannot be read, what it was stays shown.
        if let Ok(contents) = read(&self.file) {
            self.shown.store(Arc::new(shown(&self.file, &contents)));
        }
    }

    fn certificates(&self) -> Vec<CertificateFile> {
        self.shown.load().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_shown_with_its_names_and_the_first_end() {
        let days = |days: i64| {
            rcgen::date_time_ymd(2030, 1, 1) + Duration::from_secs(86_400 * days.unsigned_abs())
        };
        let mut pem = String::new();
        for (name, after) in [("a.test", 9), ("b.test", 2)] {
            let mut params =
                rcgen::CertificateParams::new(vec![name.to_owned(), "10.0.0.1".to_owned()])
                    .unwrap();
            params.not_after = days(after);
            let key = rcgen::KeyPair::generate().unwrap();
            pem += &params.self_signed(&key).unwrap().pem();
        }
        let files = [
            Named::new("cert_file", Path::new("a.pem")),
            Named::new("key_file", Path::new("a.key")),
        ];
        let pem = pem.into_bytes();
        let cas = shown(
            &[Named::new("ca_file", Path::new("a.pem"))],
            std::slice::from_ref(&pem),
        );
        assert_eq!(
            cas[0].ends,
            SystemTime::from(days(9)),
            "the others may be of no use any more"
        );
        let shown = shown(&files, &[pem, b"no certificate".to_vec()]);
        let expected = CertificateFile {
            field: "cert_file".to_owned(),
            file: "a.pem".into(),
            names: vec!["b.test".to_owned(), "10.0.0.1".to_owned()],
            ends: days(2).into(),
        };
        assert_eq!(shown, [expected]);
    }
}
