//! Files that the configuration names.

use std::path::{Path, PathBuf};

use crate::error::ClusterError;
use crate::pem::invalid_file;
use crate::proxy::CertificateFile;

/// A file that the configuration names.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub(super) field: String,
    pub(super) path: PathBuf,
}

impl Named {
    pub(super) fn new(field: &str, path: &Path) -> Self {
        Self {
            field: field.to_owned(),
            path: path.to_owned(),
        }
    }
}

pub(super) fn read(files: &[Named]) -> Result<Vec<Vec<u8>>, ClusterError> {
    let read = |file: &Named| {
        std::fs::read(&file.path)
            .map_err(|error| invalid_file(&file.field, &file.path, &error.to_string()))
    };
    files.iter().map(read).collect()
}

/// A hash of contents.
pub(super) fn fingerprint(contents: &[Vec<u8>]) -> u128 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    for content in contents {
        hasher.update(&content.len().to_le_bytes());
        hasher.update(content);
    }
    hasher.digest128()
}

/// Something that looks at its files.
pub(in crate::proxy) trait Check: Send + Sync {
    fn check_files(&self);

    /// The certificates in the files that are in use.
    fn certificates(&self) -> Vec<CertificateFile>;
}
