//! Two sagas at once that want the same thing, of which there is one.
//!
//! Sagas share no messages and no fences. One sees what the other does only in a participant's business, here a single
//! piece in stock. So the worlds of two are pairs of the worlds of one, less those in which both have the piece.

use super::{
    fences::Fence,
    model::{Model, World},
    rules::Violation,
    walk::Walk,
};
use crate::saga::state::Status;
use std::collections::HashSet;

/// The result of exploring two sagas at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pairs {
    /// How many pairs of worlds can be reached.
    pub worlds: usize,
    /// How many things can happen, over all of them.
    pub transitions: usize,
    /// The number of them in which one saga is completed and the other compensated.
    pub one_of_each: usize,
}

/// Visits every pair of worlds of `walk` that can be reached while `step` has one piece to give.
///
/// # Errors
/// When both sagas are at an end and the piece is not where it should be.
pub fn walk_pairs(model: &Model<'_>, walk: &Walk, step: usize) -> Result<Pairs, Violation> {
    let holds: Vec<bool> = walk.worlds.iter().map(|world| holds(world, step)).collect();
    let ends: Vec<Option<bool>> = walk
        .worlds
        .iter()
        .map(|world| match model.state(world).status {
            Status::Completed => Some(true),
            Status::Compensated => Some(false),
            _ => None,
        })
        .collect();
    let size = walk.worlds.len() as u64;
    // Two sagas of one definition are alike, so a pair and its mirror are one.
    let key = |a: u32, b: u32| u64::from(a.min(b)) * size + u64::from(a.max(b));
    let mut seen = HashSet::from([key(0, 0)]);
    let mut todo = vec![(0_u32, 0_u32)];
    let mut pairs = Pairs { worlds: 0, transitions: 0, one_of_each: 0 };
    while let Some((a, b)) = todo.pop() {
        pairs.worlds += 1;
        let (held, ended) = ([holds[a as usize], holds[b as usize]], (ends[a as usize], ends[b as usize]));
        if let (Some(a), Some(b)) = ended {
            if held != [a, b] || (a && b) {
                let rule = "of two sagas at their ends, the one that completed has the piece";
                return Err(Violation { rule, schedule: Vec::new() });
            }
            pairs.one_of_each += usize::from(a != b);
        }
        let first = walk.next[a as usize].iter().map(|next| (*next, b));
        let second = walk.next[b as usize].iter().map(|next| (a, *next));
        for (a, b) in first.chain(second) {
            if holds[a as usize] && holds[b as usize] {
                continue;
            }
            pairs.transitions += 1;
            if seen.insert(key(a, b)) {
                todo.push((a, b));
            }
        }
    }
    Ok(pairs)
}

fn holds(world: &World, step: usize) -> bool {
    matches!(world.fences[step], Fence::Calling | Fence::Called | Fence::Done)
}
