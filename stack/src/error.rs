//! What can go wrong, said so that the reader knows what to do.

use std::{fmt, path::PathBuf};

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the system, or a part of it, did not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that has to be installed is not.
    #[error("{what}.\n  Install it: {install}\n  Or point DATABASE_URL and KAFKA_BROKERS to servers that run already.")]
    Missing {
        /// What is missing.
        what: String,
        /// The command that gets it.
        install: String,
    },
    /// The operating system refused something.
    #[error("could not {doing}: {source}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A directory is not ours alone.
    #[error(
        "the directory {} cannot be used: {why}.\n  Either {cure}, or name another: STACK_CACHE is the cache's, STACK_DIR what `make up` keeps.", .directory.display()
    )]
    NotOurs {
        /// Which.
        directory: PathBuf,
        /// Whose it is as well.
        why: String,
        /// What to type.
        cure: String,
    },
    /// A jar is not the one that is listed.
    #[error("{jar} is not used: {why}.\n  {cure}")]
    Jar {
        /// Which.
        jar: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        cure: String,
    },
    /// A process ended that should not have.
    #[error("{name} ended while it was starting ({status}).\n{}", LogTail(.log))]
    Exited {
        /// Which.
        name: String,
        /// How.
        status: String,
        /// Its log.
        log: PathBuf,
    },
    /// A process runs but does not become healthy.
    #[error("{name} was not healthy after {seconds} s: {last}.\n{}", LogTail(.log))]
    Unhealthy {
        /// Which.
        name: String,
        /// How long it was given.
        seconds: u64,
        /// What the last look said.
        last: String,
        /// Its log.
        log: PathBuf,
    },
    /// A tool failed.
    #[error("{name} failed ({status}).\n{}", LogTail(.log))]
    Failed {
        /// Which.
        name: String,
        /// How.
        status: String,
        /// What it wrote.
        log: PathBuf,
    },
    /// Everything else.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// For `map_err`: what was being done when the operating system refused.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// The end of a log, indented, and where the rest is.
struct LogTail<'a>(&'a PathBuf);

/// How many of a log's last lines an error shows.
const TAIL_LINES: usize = 12;

impl fmt::Display for LogTail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::fs::read(self.0).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            writeln!(f, "    | {line}")?;
        }
        write!(f, "  The log: {}", self.0.display())
    }
}
