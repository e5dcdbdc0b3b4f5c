//! A walk: it visits all worlds of a model.

use super::{
    model::{ExplorerStep, Model, World},
    rules::{Violation, needs_a_person},
};
use std::collections::{BTreeMap, HashMap};

/// All worlds of a model, and which of them follow each other.
#[derive(Debug)]
pub struct Walk {
    pub(super) worlds: Vec<World>,
    /// The worlds that come next, for each world.
    pub(super) next: Vec<Vec<u32>>,
    came_by: Vec<Option<(u32, ExplorerStep)>>,
    /// How many things can happen, over all worlds.
    pub transitions: usize,
    /// How many worlds there are by the saga's status.
    pub by_status: BTreeMap<&'static str, usize>,
}

impl Walk {
    /// How many worlds there are.
    pub fn worlds(&self) -> usize {
        self.worlds.len()
    }

    fn schedule(&self, mut world: u32) -> Vec<ExplorerStep> {
        let mut schedule = Vec::new();
        while let Some((parent, by)) = self.came_by[world as usize] {
            schedule.push(by);
            world = parent;
        }
        schedule.reverse();
        schedule
    }
}

impl Model<'_> {
    /// Visits every world that can be reached, each by a shortest way, and checks every rule in each of them. Then it
    /// checks that from each world the saga can still end, or is stuck where only an operator can know.
    ///
    /// # Errors
    /// With the first rule that is broken, and the shortest schedule that breaks it.
    ///
    /// # Panics
    /// When there are more than `most` worlds.
    pub fn walk(&self, most: usize) -> Result<Walk, Violation> {
        let begin = self.begin()?;
        let (next, came_by, by_status) = (Vec::new(), vec![None], BTreeMap::new());
        let mut walk = Walk { worlds: vec![begin], next, came_by, transitions: 0, by_status };
        let mut index = HashMap::from([(begin, 0_u32)]);
        let mut at = 0;
        while let Some(world) = walk.worlds.get(at).copied() {
            let from = u32::try_from(at).unwrap_or(u32::MAX);
            let mut next = Vec::new();
            for by in self.next_steps(&world) {
                let after = self.take(&world, by).map_err(|violation| {
                    let mut schedule = walk.schedule(from);
                    schedule.push(by);
                    Violation { schedule, ..violation }
                })?;
                walk.transitions += 1;
                let to = *index.entry(after).or_insert_with(|| {
                    walk.worlds.push(after);
                    walk.came_by.push(Some((from, by)));
                    u32::try_from(walk.worlds.len() - 1).unwrap_or(u32::MAX)
                });
                if to != from && !next.contains(&to) {
                    next.push(to);
                }
            }
            walk.next.push(next);
            *walk.by_status.entry(self.state(&world).status.as_str()).or_default() += 1;
            assert!(walk.worlds.len() <= most, "more than {most} worlds");
            at += 1;
        }
        self.check_that_all_can_end(&walk)?;
        Ok(walk)
    }

    /// Takes a schedule again, from the beginning.
    ///
    /// # Errors
    /// With the rule that it breaks.
    pub fn replay(&self, schedule: &[ExplorerStep]) -> Result<World, Violation> {
        let mut world = self.begin()?;
        for by in schedule {
            world = self.take(&world, *by)?;
        }
        Ok(world)
    }

    fn check_that_all_can_end(&self, walk: &Walk) -> Result<(), Violation> {
        let mut before = vec![Vec::new(); walk.worlds.len()];
        for (from, next) in walk.next.iter().enumerate() {
            for to in next {
                before[*to as usize].push(from);
            }
        }
        let mut can_end = vec![false; walk.worlds.len()];
        let ended = (0..walk.worlds.len()).filter(|at| {
            let state = self.state(&walk.worlds[*at]);
            state.is_finished() || needs_a_person(&walk.worlds[*at], &state)
        });
        let mut todo: Vec<usize> = ended.collect();
        while let Some(at) = todo.pop() {
            if !std::mem::replace(&mut can_end[at], true) {
                todo.extend(before[at].iter().filter(|from| !can_end[**from]));
            }
        }
        match can_end.iter().position(|can| !can) {
            None => Ok(()),
            Some(lost) => {
                let rule = "from every world there is a way to an end";
                Err(Violation { rule, schedule: walk.schedule(u32::try_from(lost).unwrap_or(u32::MAX)) })
            }
        }
    }
}
