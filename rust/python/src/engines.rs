//! Engines that are kept between calls: starting threads costs more than a small product.

use std::sync::Mutex;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use safelora_fast_core::kernels::{Engine, Level};

/// Idle engines, each with the process it belongs to: threads do not survive a fork.
static WAITING: Mutex<Vec<(u32, Engine)>> = Mutex::new(Vec::new());

/// Returns an idle engine of this process, or a new one.
pub(crate) fn take(threads: usize, level: Level) -> PyResult<Engine> {
    // A lock that was held during a fork stays locked in the child: skip the idle engines rather than wait.
    if let Ok(mut waiting) = WAITING.try_lock() {
        let process = std::process::id();
        for (_, engine) in waiting.extract_if(.., |(owner, _)| *owner != process) {
            // Dropping a pool would contact threads that exist only in the parent process.
            std::mem::forget(engine);
        }
        let fits = |engine: &Engine| engine.threads() == threads && engine.level() == level;
        if let Some(position) = waiting.iter().position(|(_, engine)| fits(engine)) {
            return Ok(waiting.swap_remove(position).1);
        }
    }
    Engine::new(threads, level).map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// Keeps an engine for the next call; at most four are kept.
pub(crate) fn keep(engine: Engine) {
    if let Ok(mut waiting) = WAITING.try_lock() {
        waiting.truncate(3);
        waiting.push((std::process::id(), engine));
    }
}
