//! The thread that maps pages before they are needed, and releases them afterwards.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::checkpoint::Pages;
use crate::projection::Job;

/// Bytes that may be mapped ahead of the first unfinished job.
const AHEAD: usize = 512 << 20;
/// Bytes requested at a time.
const PIECE: usize = 8 << 20;

/// Progress of the work.
#[derive(Debug, Default)]
pub(super) struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Number of finished jobs.
    finished: usize,
    stopped: bool,
}

impl Progress {
    /// Records that the job at this position and all jobs before it are finished.
    pub(super) fn finish(&self, index: usize) {
        self.lock().finished = index + 1;
        self.changed.notify_all();
    }

    /// Ends the prefetching.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> State {
        let guard = self.lock();
        *self.changed.wait_while(guard, |state| condition(state)).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Maps the pages of the jobs in order and releases those of finished jobs, until the work stops.
pub(super) fn run(jobs: &[Arc<Job>], progress: &Progress) {
    // Position of each job in the sequence of all bytes.
    let starts: Vec<usize> = jobs
        .iter()
        .scan(0, |total, job| {
            let start = *total;
            *total += job.nbytes();
            Some(start)
        })
        .collect();
    let mut given_back = 0;
    let mut follow = |finished: usize| {
        for job in &jobs[given_back.min(finished)..finished] {
            stretches(job).for_each(|pages| pages.give_back());
        }
        given_back = finished;
    };
    for (index, job) in jobs.iter().enumerate() {
        let mut position = starts[index];
        for pages in pieces(job) {
            let is_far = |state: &State| {
                let first = state.finished.min(index);
                first < index && position + pages.len() > starts[first] + AHEAD
            };
            let mut state = *progress.lock();
            while !state.stopped && is_far(&state) {
                let seen = state.finished;
                follow(seen);
                state = progress.wait_while(|state| !state.stopped && state.finished == seen);
            }
            follow(state.finished);
            if state.stopped {
                return;
            }
            if state.finished <= index {
                pages.populate();
            }
            position += pages.len();
        }
    }
    let mut state = *progress.lock();
    while !state.stopped && state.finished < jobs.len() {
        let seen = state.finished;
        follow(seen);
        state = progress.wait_while(|state| !state.stopped && state.finished == seen);
    }
    follow(state.finished);
}

/// All ranges of both checkpoints that a job reads.
fn stretches(job: &Job) -> impl Iterator<Item = Pages<'_>> {
    job.parts().iter().flat_map(|part| [part.aligned().pages(), part.base().pages()])
}

/// The ranges of a job in pieces, alternating between both checkpoints as the work reads them.
fn pieces(job: &Job) -> impl Iterator<Item = Pages<'_>> {
    job.parts().iter().flat_map(|part| {
        let (mut aligned, mut base) = (part.aligned().pages().pieces(PIECE), part.base().pages().pieces(PIECE));
        std::iter::from_fn(move || {
            let pair = [aligned.next(), base.next()];
            pair.iter().any(Option::is_some).then_some(pair)
        })
        .flat_map(|pair| pair.into_iter().flatten())
    })
}
