//! The messages of a saga: each one bit, so that a world is small.

use super::model::World;
use crate::command::Op;

/// Most attempts of a command.
pub(super) const ATTEMPTS_MAX: u32 = 3;

/// A message, by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Note {
    /// A command; the number is its attempt.
    Command(u32),
    /// The command, or its undo, is done.
    Succeeded,
    /// Certainly nothing happened.
    Rejected,
    /// The attempt of this number failed.
    Failed(u32),
}

/// Eight messages per step and direction: three attempts of the command, three failures, two final answers.
pub(super) fn bit(step: usize, op: Op, note: Note) -> u128 {
    let note = match note {
        Note::Command(attempt) => attempt - 1,
        Note::Failed(attempt) => 2 + attempt,
        Note::Succeeded => 6,
        Note::Rejected => 7,
    };
    1 << (step * 16 + usize::from(op == Op::Undo) * 8 + note as usize)
}

pub(super) fn notes(messages: u128) -> impl Iterator<Item = (usize, Op, Note)> {
    let mut left = messages;
    std::iter::from_fn(move || {
        let index = (left != 0).then(|| left.trailing_zeros())?;
        left &= left - 1;
        let note = match index % 8 {
            attempt @ 0..=2 => Note::Command(attempt + 1),
            attempt @ 3..=5 => Note::Failed(attempt - 2),
            6 => Note::Succeeded,
            _ => Note::Rejected,
        };
        let op = if index % 16 < 8 { Op::Do } else { Op::Undo };
        Some((index as usize / 16, op, note))
    })
}

impl World {
    /// Whether a command was ever sent.
    pub(super) fn was_sent(&self, step: usize, op: Op) -> bool {
        (1..=ATTEMPTS_MAX).any(|attempt| self.messages & bit(step, op, Note::Command(attempt)) != 0)
    }
}
