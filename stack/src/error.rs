//! The errors of this crate, in words that show the reader what to do.

use std::{fmt, path::PathBuf};

/// The result of every function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the system, or a part of it, did not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that has to be installed is not.
    #[error("{what}.\n  Install it: {install}\n  Or point DATABASE_URL and KAFKA_BROKERS to servers that run already.")]
    Missing {
        /// The program that is missing, in words.
        what: String,
        /// The command that installs the program.
        install: String,
    },
    /// The operating system refused an operation.
    #[error("could not {doing}: {source}")]
    Io {
        /// The operation, as in `write the file`.
        doing: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A directory is not ours alone.
    #[error(
        "the directory {} cannot be used: {why}.\n  Either {cure}, or name another: STACK_CACHE is the cache's, STACK_DIR what `make up` keeps.", .directory.display()
    )]
    NotOurs {
        /// The path of the directory.
        directory: PathBuf,
        /// Whose the directory is as well, in words.
        why: String,
        /// What to do, as the reader would type it.
        cure: String,
    },
    /// A jar is not the one that is listed.
    #[error("{jar} is not used: {why}.\n  {cure}")]
    Jar {
        /// The name of the jar.
        jar: String,
        /// What is wrong with the jar.
        why: String,
        /// What to do, in words.
        cure: String,
    },
    /// A process ended that should not have.
    #[error("{name} ended while it was starting ({status}).\n{}", LogTail(.log))]
    Exited {
        /// The process's name.
        name: String,
        /// The exit status, in words.
        status: String,
        /// The path of its log.
        log: PathBuf,
    },
    /// A process runs but does not become healthy.
    #[error("{name} was not healthy after {seconds} s: {last}.\n{}", LogTail(.log))]
    Unhealthy {
        /// The process's name.
        name: String,
        /// How long the process was given, in seconds.
        seconds: u64,
        /// The answer to the last check.
        last: String,
        /// The path of its log.
        log: PathBuf,
    },
    /// A tool, such as Maven, failed.
    #[error("{name} failed ({status}).\n{}", LogTail(.log))]
    Failed {
        /// The tool's name.
        name: String,
        /// The exit status, in words.
        status: String,
        /// The path of the tool's log.
        log: PathBuf,
    },
    /// Any other error, in words.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Makes an error for `map_err`; `doing` is the operation that the operating system refused.
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
