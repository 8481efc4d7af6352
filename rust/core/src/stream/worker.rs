//! The thread that projects.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;

use super::Message;
use super::prefetch::Progress;
use crate::projection::{Job, JobOutcome, ProjectionError, Projector};

pub(super) struct Worker {
    pub(super) jobs: Arc<[Arc<Job>]>,
    pub(super) projector: Projector,
    pub(super) sender: SyncSender<Message>,
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) bytes_done: Arc<AtomicU64>,
    pub(super) progress: Arc<Progress>,
}

impl Worker {
    pub(super) fn run(mut self) {
        let jobs = Arc::clone(&self.jobs);
        for (index, job) in jobs.iter().enumerate() {
            let result = self.project(job);
            let failed = result.is_err();
            self.bytes_done.fetch_add(job.nbytes() as u64, Ordering::Relaxed);
            self.progress.finish(index);
            if self.sender.send((index, result)).is_err() || failed {
                break;
            }
        }
        self.progress.stop();
    }

    fn project(&mut self, job: &Job) -> Result<JobOutcome, ProjectionError> {
        let (projector, cancel) = (&mut self.projector, &*self.cancel);
        catch_unwind(AssertUnwindSafe(|| projector.run(job, cancel))).unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let message = message.unwrap_or_else(|| "unknown panic".to_owned());
            Err(ProjectionError::Internal { module: job.name().to_owned(), message })
        })
    }
}
