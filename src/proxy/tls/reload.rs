//! Something that is made from files, and made again when they change.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use ::pingora::server::ShutdownWatch;
use ::pingora::services::background::BackgroundService;
use arc_swap::ArcSwap;
use async_trait::async_trait;
use tracing::{error, info, warn};

use super::files::{Check, Named, fingerprint, read};
use super::shown::{Watched, ends, shown};
use crate::error::ClusterError;
use crate::proxy::CertificateFile;
use crate::supervise::{caught, say};
use crate::sync::lock;

/// How often to look whether a file has changed.
const INTERVAL: Duration = Duration::from_secs(3);

type Make<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, ClusterError> + Send + Sync>;

/// What was made from the files last.
pub(in crate::proxy) struct Reloaded<T> {
    current: ArcSwap<T>,
    files: Vec<Named>,
    make: Make<T>,
    shown: ArcSwap<Vec<CertificateFile>>,
    /// A hash of the contents that were tried last, so that no key stays in memory.
    tried: Mutex<u128>,
    /// When the certificates in use end, without those that signed them; and the contents that were refused for having ended
    /// before.
    ends: Mutex<Vec<SystemTime>>,
    over: Mutex<u128>,
    /// A file could not be read when it was last tried.
    is_unread: AtomicBool,
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Makes it from the contents of these files, in their order.
    pub(super) fn new(
        files: Vec<Named>,
        make: impl Fn(&[Vec<u8>]) -> Result<T, ClusterError> + Send + Sync + 'static,
    ) -> Result<Self, ClusterError> {
        let contents = read(&files)?;
        Ok(Self {
            current: ArcSwap::from_pointee(make(&contents)?),
            tried: fingerprint(&contents).into(),
            ends: ends(&files, &contents).into(),
            over: 0.into(),
            shown: ArcSwap::from_pointee(shown(&files, &contents)),
            files,
            make: Box::new(make),
            is_unread: AtomicBool::new(false),
        })
    }

    pub(super) fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Makes it again if the files have changed. Files that cannot be used change nothing. Blocks.
    pub(super) fn check(&self) {
        let first = || {
            self.files
                .first()
                .map(|file| file.path.display().to_string())
        };
        let contents = match read(&self.files) {
            Ok(contents) => contents,
            // As while it is being replaced.
            Err(error) => {
                if !self.is_unread.swap(true, Ordering::Relaxed) {
                    say(|| {
                        warn!(%error, "a certificate file cannot be read; the former one is still in use");
                    });
                }
                return;
            }
        };
        self.is_unread.store(false, Ordering::Relaxed);
        let found = fingerprint(&contents);
        if *lock(&self.tried) == found {
            return;
        }
        let new_ends = ends(&self.files, &contents);
        if self.would_end_before(&new_ends) {
            // To be taken once the ones in use have ended, too.
            if std::mem::replace(&mut *lock(&self.over), found) != found {
                say(|| {
                    error!(
                        first = first(),
                        "changed certificate files have ended already; the former ones, which have not, are still in use"
                    );
                });
            }
            return;
        }
        *lock(&self.tried) = found;
        match (self.make)(&contents) {
            Ok(made) => {
                self.current.store(Arc::new(made));
                self.shown.store(Arc::new(shown(&self.files, &contents)));
                *lock(&self.ends) = new_ends;
                say(|| info!(first = first(), "changed certificate files are in use"));
            }
            Err(error) => {
                say(
                    || error!(%error, "changed certificate files cannot be used; the former ones are still in use"),
                );
            }
        }
    }

    /// Whether one of these is over, and none of those in use.
    fn would_end_before(&self, new: &[SystemTime]) -> bool {
        let now = SystemTime::now();
        let is_any_over = |all: &[SystemTime]| all.iter().any(|ends| *ends < now);
        is_any_over(new) && !is_any_over(&lock(&self.ends))
    }
}

impl<T: Send + Sync + 'static> Check for Reloaded<T> {
    fn check_files(&self) {
        self.check();
    }

    fn certificates(&self) -> Vec<CertificateFile> {
        self.shown.load().to_vec()
    }
}

/// The service that checks all files that are in use.
#[derive(Clone, Default)]
pub(in crate::proxy) struct Reload {
    files: Arc<Mutex<Vec<Weak<dyn Check>>>>,
    /// Those that are used elsewhere, and only shown here.
    of_others: Arc<Mutex<Vec<Arc<dyn Check>>>>,
}

impl Reload {
    /// Also checks these, as long as somebody uses them.
    pub(in crate::proxy) fn add(&self, files: &[Arc<dyn Check>]) {
        lock(&self.files).extend(files.iter().map(Arc::downgrade));
    }

    /// Also shows these files, which something else uses and reads again.
    pub(in crate::proxy) fn show<'a>(&self, files: impl Iterator<Item = (&'a str, &'a Path)>) {
        let files: Vec<_> = files
            .map(|(field, path)| Watched::of(field, path))
            .collect();
        self.add(&files);
        lock(&self.of_others).extend(files);
    }

    /// The certificates that are in use, each file once, by the first field that names it.
    pub(in crate::proxy) fn certificates(&self) -> Vec<CertificateFile> {
        let mut all: Vec<_> = self
            .in_use()
            .iter()
            .flat_map(|files| files.certificates())
            .collect();
        // While a file is being replaced, it may have been read before and after that.
        all.sort_by(|one, other| {
            (&one.file, &one.field, one.ends).cmp(&(&other.file, &other.field, other.ends))
        });
        all.dedup_by(|one, other| one.file == other.file);
        all.sort_by(|one, other| one.field.cmp(&other.field));
        all
    }

    fn in_use(&self) -> Vec<Arc<dyn Check>> {
        let mut all = lock(&self.files);
        all.retain(|files| files.strong_count() > 0);
        all.iter().filter_map(Weak::upgrade).collect()
    }
}

#[async_trait]
impl BackgroundService for Reload {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        while tokio::time::timeout(INTERVAL, shutdown.changed())
            .await
            .is_err()
        {
            for check in self.in_use() {
                let checking = tokio::task::spawn_blocking(move || check.check_files());
                if let Ok(Err(error)) = caught(checking).await {
                    say(|| error!(%error, "looking at certificate files failed"));
                }
            }
        }
    }
}
