//! The log that a process would write.

use crate::service::log_line::JsonLines;
use serde_json::Value;
use std::{
    io,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};
use tracing::{
    Dispatch,
    subscriber::{DefaultGuard, NoSubscriber},
};
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt};

/// Captures what is logged on the thread that made it, until it is dropped. That is all the log of a test's tasks, if
/// its runtime has that one thread only.
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

/// With only one subscriber, tracing asks it once whether an event is wanted, on the first thread that comes there. It
/// remembers the answer for all threads. On another test's thread, which captures nothing, the answer would be no. With
/// two subscribers, tracing asks both.
static ANOTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::default()));

impl Log {
    /// Captures what a process with this `RUST_LOG` would write.
    ///
    /// # Panics
    /// When the filter cannot be read.
    pub fn hear(filter: &str) -> Self {
        LazyLock::force(&ANOTHER);
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = Registry::default()
            .with(EnvFilter::try_new(filter).expect("a filter"))
            .with(JsonLines::new("test", move || writer.clone()));
        Self { lines, _heard: tracing::subscriber::set_default(subscriber) }
    }

    /// The lines whose message begins with `message`, oldest first.
    pub fn said(&self, message: &str) -> Vec<Value> {
        let mut lines = self.lines();
        lines.retain(|line| line["message"].as_str().is_some_and(|text| text.starts_with(message)));
        lines
    }

    /// The warnings and errors, oldest first.
    pub fn warnings(&self) -> Vec<Value> {
        let mut lines = self.lines();
        lines.retain(|line| line["level"] == "WARN" || line["level"] == "ERROR");
        lines
    }

    /// The SQL that was run, oldest first, if the filter lets `sqlx::query=debug` through. The lines come from sqlx and
    /// not from the code that runs the SQL, so they count statements as they are sent. Only `begin` is missing, because
    /// sqlx does not log it.
    pub fn statements(&self) -> Vec<String> {
        let lines = self.lines().into_iter().filter(|line| line["target"] == "sqlx::query");
        let texts = lines.map(|line| {
            // sqlx puts long statements in a field of their own.
            let [whole, summary] = ["db.statement", "summary"].map(|field| line[field].as_str().unwrap_or_default());
            if whole.is_empty() { summary.to_owned() } else { whole.trim().to_owned() }
        });
        texts.collect()
    }

    fn lines(&self) -> Vec<Value> {
        let text = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let lines = serde_json::Deserializer::from_slice(&text).into_iter();
        lines.map(|line| line.expect("a log is lines of JSON")).collect()
    }
}
