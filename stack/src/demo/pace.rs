//! How long the demo took, in all and by phase: each run should show whether the promise holds.

use std::time::{Duration, Instant};

/// The time that a run is meant to stay under, once PostgreSQL and Kafka are fetched and everything is built. It is
/// shown, not enforced: how busy a machine is, is not the demo's doing.
const PROMISED_WITHIN: Duration = Duration::from_secs(30);

/// A clock that is read at the end of each phase.
#[derive(Debug)]
pub(crate) struct Pace {
    phase_began: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl Pace {
    /// Begins the first phase.
    pub(crate) fn begin() -> Self {
        Self { phase_began: Instant::now(), phases: Vec::new() }
    }

    /// Ends a phase and begins the next one. The name is what the phase was for: `to start everything`.
    pub(crate) fn phase(&mut self, what_for: &'static str) {
        let now = Instant::now();
        self.phases.push((what_for, now - self.phase_began));
        self.phase_began = now;
    }

    /// The times, for people: in all, by phase, and whether that is more than was promised.
    pub(crate) fn said(&self) -> String {
        let all: Duration = self.phases.iter().map(|(_, took)| *took).sum();
        let phases: Vec<_> =
            self.phases.iter().map(|(what_for, took)| format!("{} {what_for}", seconds(*took))).collect();
        let said = format!("All of it in {}: {}.", seconds(all), phases.join(", "));
        let Some(over) = all.checked_sub(PROMISED_WITHIN).filter(|over| !over.is_zero()) else { return said };
        let (over, promised) = (seconds(over), PROMISED_WITHIN.as_secs());
        format!(
            "{said}\nThat is {over} over the {promised} s that a run is meant to take (the first one fetches the servers, too)."
        )
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(phases: &[(&'static str, u64)]) -> Pace {
        let phases = phases.iter().map(|(what_for, millis)| (*what_for, Duration::from_millis(*millis))).collect();
        Pace { phase_began: Instant::now(), phases }
    }

    #[test]
    fn the_phases_add_up_to_the_whole() {
        let said = pace(&[("to start", 9_100), ("for the orders", 12_000), ("to stop", 1_250)]).said();
        assert_eq!(said, "All of it in 22.4 s: 9.1 s to start, 12.0 s for the orders, 1.2 s to stop.");
    }

    #[test]
    fn what_is_over_the_promise_is_said_and_by_how_much() {
        assert_eq!(pace(&[("to start", 30_000)]).said(), "All of it in 30.0 s: 30.0 s to start.");
        let said = pace(&[("to start", 30_000), ("to stop", 2_500)]).said();
        assert!(said.contains("\nThat is 2.5 s over the 30 s that a run is meant to take"), "{said}");
    }
}
