//! What a person sees while things start: a spinner with the current step on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::{io::IsTerminal, time::Duration};

/// How often the spinner turns.
const TURN: Duration = Duration::from_millis(100);

/// Where progress goes: standard error, so that standard output stays the command's own.
#[derive(Debug, Clone)]
pub enum Progress {
    /// A terminal.
    Bar(ProgressBar),
    /// A file or a pipe.
    Lines,
    /// Nobody looks (tests).
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
        bar.enable_steady_tick(TURN);
        Self::Bar(bar)
    }

    /// Something has begun and takes a while.
    pub fn step(&self, what: impl AsRef<str>) {
        match self {
            Self::Bar(bar) => bar.set_message(what.as_ref().to_owned()),
            Self::Lines => eprintln!("  {} ...", what.as_ref()),
            Self::Silent => {}
        }
    }

    /// Something is done and worth keeping on the screen.
    pub fn done(&self, what: impl AsRef<str>) {
        match self {
            Self::Bar(bar) => bar.println(format!("  {}", what.as_ref())),
            Self::Lines => eprintln!("  {}", what.as_ref()),
            Self::Silent => {}
        }
    }

    /// Nothing more will come; the spinner leaves the screen.
    pub fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
