//! Projects many modules in order. Pages are mapped before they are needed, and released afterwards.

mod prefetch;
mod threads;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::kernels::{Engine, Level, StartError};
use crate::projection::{Job, JobOutcome, ProjectionError, Projector, Settings};
use prefetch::Progress;

pub use threads::{THREADS_VARIABLE, ThreadsError, default_threads};

/// Most outcomes that wait for the caller before the work pauses.
const WAITING: usize = 4;

type Message = (usize, Result<JobOutcome, ProjectionError>);

/// Result of [`Stream::next`].
#[derive(Debug)]
pub enum Next {
    /// The outcome of the job at this position.
    Outcome(usize, JobOutcome),
    /// The job at this position failed; nothing follows.
    Failed(usize, ProjectionError),
    /// No outcome yet.
    Pending,
    /// All outcomes were returned, or the stream was closed.
    Finished,
}

/// Projects jobs in the given order, on its own threads.
#[derive(Debug)]
pub struct Stream {
    receiver: Mutex<Option<Receiver<Message>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    cancel: Arc<AtomicBool>,
    bytes_done: Arc<AtomicU64>,
    progress: Arc<Progress>,
    process: u32,
}

impl Stream {
    /// Starts the work.
    ///
    /// # Errors
    /// If the CPU lacks `level` or the system cannot start the threads.
    pub fn start(jobs: Vec<Arc<Job>>, settings: Settings, threads: usize, level: Level) -> Result<Self, StartError> {
        let projector = Projector::new(Engine::new(threads, level)?, settings);
        let jobs: Arc<[Arc<Job>]> = jobs.into();
        let (sender, receiver) = sync_channel(WAITING);
        let stream = Self {
            receiver: Mutex::new(Some(receiver)),
            threads: Mutex::default(),
            cancel: Arc::default(),
            bytes_done: Arc::default(),
            progress: Arc::default(),
            process: std::process::id(),
        };
        let worker = worker::Worker {
            jobs: Arc::clone(&jobs),
            projector,
            sender,
            cancel: Arc::clone(&stream.cancel),
            bytes_done: Arc::clone(&stream.bytes_done),
            progress: Arc::clone(&stream.progress),
        };
        stream.spawn("safelora-fast-stream", move || worker.run())?;
        let progress = Arc::clone(&stream.progress);
        stream.spawn("safelora-fast-prefetch", move || prefetch::run(&jobs, &progress))?;
        Ok(stream)
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work).map_err(StartError::Thread)?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }

    /// Whether this process inherited the stream through a fork. The threads exist only in the parent.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        self.process != std::process::id()
    }

    /// Waits up to `timeout` for the next outcome.
    pub fn next(&self, timeout: Duration) -> Next {
        if self.is_foreign() {
            return Next::Finished;
        }
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        let message = match receiver.as_ref().map(|receiver| receiver.recv_timeout(timeout)) {
            Some(Err(RecvTimeoutError::Timeout)) => return Next::Pending,
            None | Some(Err(RecvTimeoutError::Disconnected)) => None,
            Some(Ok(message)) => Some(message),
        };
        match message {
            Some((index, Ok(outcome))) => Next::Outcome(index, outcome),
            Some((index, Err(error))) => {
                *receiver = None;
                Next::Failed(index, error)
            }
            None => {
                *receiver = None;
                Next::Finished
            }
        }
    }

    /// Bytes of both checkpoints that finished jobs have read.
    #[must_use]
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed)
    }

    /// Tells the work to stop, without waiting.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
        if !self.is_foreign() {
            self.progress.stop();
        }
    }

    /// Stops the work and waits until its threads have ended.
    pub fn close(&self) {
        self.cancel();
        if self.is_foreign() {
            return;
        }
        // A worker that waits for room in the channel ends when the receiver is gone.
        *self.receiver.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic was already reported as an outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_foreign() {
            // Threads and channel belong to the parent process: leave them unchanged.
            if let Ok(receiver) = self.receiver.get_mut() {
                std::mem::forget(receiver.take());
            }
            if let Ok(threads) = self.threads.get_mut() {
                std::mem::forget(std::mem::take(threads));
            }
        } else {
            self.close();
        }
    }
}
