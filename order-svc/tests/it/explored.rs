//! The order saga itself in every world there is: `saga-core/tests/explorer.rs` does the same with sagas of its shape,
//! and of any other. A step that is added to it is explored here.

use order_svc::order_saga::order_saga;
use proptest::prelude::*;
use saga_core::{
    saga::{
        decide::decide,
        definition::{Definition, StepKind},
    },
    testkit::explorer::{Limits, Model},
};

const EVERYTHING: Limits =
    Limits { attempts: 2, breaks: 1, losses: 0, external: true, failures: true, cancels: true, mistake: None };

/// The order saga, but each command is issued so many times at most. The worlds of a third attempt are like those of
/// the second, and too many.
fn order_of_few_attempts(attempts: u32) -> Definition {
    let order = order_saga();
    let mut steps = order.steps().to_vec();
    for step in &mut steps {
        if let StepKind::Remote(remote) = &mut step.kind {
            remote.retry.attempts = Some(attempts);
            remote.undo_retry.attempts = Some(attempts);
        }
    }
    let few = Definition::new(order.name(), order.version(), steps, order.deadline());
    assert_eq!(few.fingerprint(), order.fingerprint(), "nothing else is changed");
    few
}

fn explored(attempts: u32, limits: Limits) {
    let order = order_of_few_attempts(attempts);
    let walk = Model::new(&order, limits, decide).walk(5_000_000).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{} worlds, {:?}", walk.worlds(), walk.by_status);
    for status in ["running", "compensating", "stuck", "completed", "compensated"] {
        assert!(walk.by_status.contains_key(status), "no world is {status}");
    }
}

#[test]
fn the_order_saga_keeps_every_rule_in_every_world_without_resends() {
    explored(1, EVERYTHING);
}

#[test]
fn the_order_saga_keeps_every_rule_in_every_world_with_resends() {
    explored(2, Limits { external: false, failures: false, ..EVERYTHING });
}

#[test]
fn the_order_saga_keeps_every_rule_where_a_participants_fence_is_lost() {
    explored(1, Limits { attempts: 1, breaks: 0, losses: 1, ..EVERYTHING });
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: Some(Box::new(proptest::test_runner::FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    /// The saga has its own retries here: every world of those would be too many to visit.
    #[test]
    fn the_order_saga_keeps_every_rule_on_random_paths(choices in prop::collection::vec(any::<u16>(), 0..200)) {
        let order = order_saga();
        let model = Model::new(&order, Limits { attempts: 3, breaks: 2, losses: 2, ..EVERYTHING }, decide);
        let mut world = model.begin().map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        let mut schedule = Vec::new();
        for choice in choices {
            let moves = model.next_steps(&world);
            let Some(next) = moves.get(usize::from(choice) % moves.len().max(1)) else { break };
            schedule.push(*next);
            world = model.take(&world, *next).map_err(|violation| {
                TestCaseError::fail(format!("broken: {}; replay {schedule:?}", violation.rule))
            })?;
        }
    }
}
