//! The progress that a person sees while things start: a spinner with the current step on a terminal, plain lines
//! elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, time::Duration};

/// How often the spinner turns.
const TURN_EVERY: Duration = Duration::from_millis(100);

/// The place of progress: standard error, so that standard output stays the command's own.
#[derive(Debug, Clone)]
pub enum Progress {
    /// Standard error is a terminal: a spinner.
    Bar(ProgressBar),
    /// Standard error is a file or a pipe: plain lines.
    Lines,
    /// No progress is shown, as in tests.
    Silent,
}

impl Progress {
    /// A spinner when standard error is a terminal, lines otherwise.
    pub fn for_people() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines;
        }
        let bar = ProgressBar::new_spinner().with_style(
            ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        bar.enable_steady_tick(TURN_EVERY);
        Self::Bar(bar)
    }

    /// Shows that a step has begun that takes a while.
    pub fn step(&self, what: impl AsRef<str>) {
        match self {
            Self::Bar(bar) => bar.set_message(what.as_ref().to_owned()),
            Self::Lines => eprintln!("  {} ...", what.as_ref()),
            Self::Silent => {}
        }
    }

    /// Shows that a step is done, and keeps that on the screen.
    pub fn done(&self, what: impl AsRef<str>) {
        match self {
            Self::Bar(bar) => bar.println(format!("  {}", what.as_ref())),
            Self::Lines => eprintln!("  {}", what.as_ref()),
            Self::Silent => {}
        }
    }

    /// Ends the progress; the spinner leaves the screen.
    pub fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
