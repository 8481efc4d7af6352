//! Engines that are kept between calls: starting threads costs more than a small product.

use std::sync::Mutex;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use safelora_fast_core::kernels::{Engine, Level};

/// Engines that wait for the next call, with the process they belong to: threads do not survive a fork.
static WAITING: Mutex<Vec<(u32, Engine)>> = Mutex::new(Vec::new());

/// An engine of this process that waits, or a new one.
pub(crate) fn take(threads: usize, level: Level) -> PyResult<Engine> {
    // A lock that was held during a fork stays held in the child: go without rather than wait for it.
    if let Ok(mut waiting) = WAITING.try_lock() {
        let process = std::process::id();
        for (_, engine) in waiting.extract_if(.., |(owner, _)| *owner != process) {
            // Dropping a pool would talk to threads that only the parent process has.
            std::mem::forget(engine);
        }
        let fits = |engine: &Engine| engine.threads() == threads && engine.level() == level;
        if let Some(position) = waiting.iter().position(|(_, engine)| fits(engine)) {
            return Ok(waiting.swap_remove(position).1);
        }
    }
    Engine::new(threads, level).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// Keeps an engine for the next call; those that nobody wants any more make room.
pub(crate) fn keep(engine: Engine) {
    if let Ok(mut waiting) = WAITING.try_lock() {
        waiting.truncate(3);
        waiting.push((std::process::id(), engine));
    }
}
