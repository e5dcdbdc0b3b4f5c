//! What a process's log would say.

use crate::service::log_line::JsonLines;
use serde_json::Value;
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt};

/// Hears what is logged on the thread that made it, until it is dropped: all that a test's tasks say, if its runtime has
/// that one thread only.
#[derive(Debug)]
pub struct Log {
    lines: Lines,
    _heard: DefaultGuard,
}

#[derive(Debug, Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// Hears what a process with this `RUST_LOG` would write.
    ///
    /// # Panics
    /// When the filter cannot be read.
    pub fn hear(filter: &str) -> Self {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = Registry::default()
            .with(EnvFilter::try_new(filter).expect("a filter"))
            .with(JsonLines::new("test", move || writer.clone()));
        Self { lines, _heard: tracing::subscriber::set_default(subscriber) }
    }

    /// The lines whose message begins like this, oldest first.
    ///
    /// # Panics
    /// When the log is not lines of JSON.
    pub fn said(&self, message: &str) -> Vec<Value> {
        let text = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines = serde_json::Deserializer::from_slice(&text).into_iter::<Value>();
        let lines = lines.map(|line| line.expect("a line of JSON"));
        lines.filter(|line| line["message"].as_str().is_some_and(|text| text.starts_with(message))).collect()
    }
}
