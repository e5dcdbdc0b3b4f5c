//! The production `decide` in every world there is; and random schedules of random definitions where there are too
//! many.
//!
//! `EXPLORE=full cargo test --release -p saga-core --test explorer` walks the larger worlds as well.

use proptest::prelude::*;
use saga_core::{
    command::{Happened, Op},
    saga::{
        decide::{command_id, decide},
        definition::Definition,
        state::{Action, Answer, Effects, Event, Failure, FailureKind, Reply, Send, State, Status, StuckWhy, Wait},
    },
    testkit::explorer::{Decide, Divide, ExplorerStep, Limits, Mistake, Model, Shape, definition, divide, walk_pairs},
};
use std::time::{Duration, Instant};
use time::OffsetDateTime;

const ORDER: [Shape; 6] = [Shape::LocalWithUndo, Shape::Step, Shape::Step, Shape::Pivot, Shape::Local, Shape::Then];
const RESERVE: usize = 2;
const EVERYTHING: Limits =
    Limits { attempts: 2, breaks: 1, losses: 0, external: true, failures: true, cancels: true, mistake: None };
const HOUR: Option<Duration> = Some(Duration::from_secs(3600));

fn explored(what: &str, definition: &Definition, limits: Limits) -> usize {
    let started = Instant::now();
    let model = Model::new(definition, limits, decide);
    let walk = model.walk(20_000_000).unwrap_or_else(|violation| panic!("{what}: {violation}"));
    let (worlds, took) = (walk.worlds(), started.elapsed());
    println!("{what}: {worlds} worlds, {} transitions, {took:?}, {:?}", walk.transitions, walk.by_status);
    for status in ["running", "compensating", "stuck", "completed", "compensated"] {
        assert!(walk.by_status.contains_key(status), "{what}: no world is {status}");
    }
    worlds
}

fn is_full() -> bool {
    std::env::var("EXPLORE").is_ok_and(|extent| extent == "full")
}

#[test]
fn an_order_keeps_every_rule_in_every_world() {
    let order = definition(&ORDER, 1, HOUR);
    explored("an order, everything but resends", &order, EVERYTHING);
    let order = definition(&ORDER, 2, HOUR);
    explored("an order that is resent", &order, Limits { external: false, failures: false, ..EVERYTHING });
    if is_full() {
        explored("an order, everything", &order, EVERYTHING);
        explored("an order, three attempts", &order, Limits { attempts: 3, external: false, ..EVERYTHING });
    }
}

#[test]
fn two_orders_at_once_that_want_the_last_piece_keep_every_rule_in_more_than_a_million_worlds() {
    let started = Instant::now();
    let order = definition(&ORDER, 2, None);
    let limits = Limits { breaks: 0, external: false, failures: false, ..EVERYTHING };
    let model = Model::new(&order, limits, decide);
    let walk = model.walk(100_000).unwrap();
    let pairs = walk_pairs(&model, &walk, RESERVE).unwrap();
    println!("{} worlds of one, {pairs:?} in {:?}", walk.worlds(), started.elapsed());
    assert!(pairs.worlds > 1_000_000 && pairs.one_of_each > 0, "{pairs:?}");
}

#[test]
fn every_definition_of_up_to_three_steps_keeps_every_rule_in_every_world() {
    let before = [Shape::Local, Shape::LocalWithUndo, Shape::Step, Shape::StepWithoutUndo];
    let (started, mut definitions, mut worlds) = (Instant::now(), 0, 0);
    let mut shapes: Vec<Vec<Shape>> = vec![Vec::new()];
    while let Some(prefix) = shapes.pop() {
        let after_pivot = prefix.contains(&Shape::Pivot);
        let next: Vec<Shape> = match after_pivot {
            false => before.into_iter().chain([Shape::Pivot]).collect(),
            true => vec![Shape::Local, Shape::Then],
        };
        for shape in next.into_iter().filter(|_| prefix.len() < 3) {
            shapes.push(prefix.iter().copied().chain([shape]).collect());
        }
        if !prefix.is_empty() {
            let small = definition(&prefix, 1, HOUR);
            let failures = prefix.len() < 3;
            let broken = Limits { failures, ..EVERYTHING };
            for limits in [broken, Limits { attempts: 1, breaks: 0, losses: 1, ..broken }] {
                let model = Model::new(&small, limits, decide);
                let walk = model.walk(1_000_000).unwrap_or_else(|violation| panic!("{prefix:?}: {violation}"));
                worlds += walk.worlds();
            }
            definitions += 1;
        }
    }
    println!("{definitions} definitions, {worlds} worlds in {:?}", started.elapsed());
}

/// Seeded mistakes about the messages that were sent, and their content.
fn mistakes_of_sending() -> Vec<(&'static str, Decide)> {
    vec![
        ("an undo says that it is in doubt whatever is known", |definition, state, event, now| {
            let (after, mut effects) = decide(definition, state, event, now);
            for action in &mut effects.actions {
                if let Action::Send(Send { undoes: Some((_, happened)), .. }) = action {
                    *happened = Happened::InDoubt;
                }
            }
            (after, effects)
        }),
        ("a command that could not be built is taken for sent", |definition, state, event, now| {
            let (mut state, effects) = decide(definition, state, event, now);
            if let (Event::Unsent { .. }, Status::Stuck { open, .. }) = (event, &mut state.status) {
                open.attempt += 1;
            }
            (state, effects)
        }),
    ]
}

/// A seeded mistake: `decide` with something wrong about it.
fn mistakes() -> Vec<(&'static str, Decide)> {
    vec![
        ("a cancel ends the saga without undoing anything", |definition, state, event, now| {
            let (mut state, effects) = decide(definition, state, event, now);
            if matches!((event, &state.status), (Event::Cancel { .. }, Status::Compensating { .. })) {
                state.status = Status::Compensated;
                return (state, Effects { actions: Vec::new(), ..effects });
            }
            (state, effects)
        }),
        ("a pivot in doubt is given up", |definition, state, event, now| {
            let (mut state, effects) = decide(definition, state, event, now);
            if let Status::Stuck { why: StuckWhy::PivotInDoubt { .. }, .. } = state.status {
                let step = String::new();
                state.failure =
                    Some(Failure { step, kind: FailureKind::Failed, rejection: None, reason: None, why: None });
                state.status = Status::Compensated;
            }
            (state, effects)
        }),
        ("the first undo counts for all", |definition, state, event, now| {
            let (mut after, effects) = decide(definition, state, event, now);
            let undoing = |state: &State| matches!(state.status, Status::Compensating { .. });
            if matches!(event, Event::Reply(_)) && undoing(state) && undoing(&after) {
                after.status = Status::Compensated;
                return (after, Effects { actions: Vec::new(), ..effects });
            }
            (after, effects)
        }),
        ("a failure is taken for a rejection", |definition, state, event, now| match event {
            Event::Reply(Reply { command, attempt, answer: Answer::Failed(_) }) => {
                let answer = Answer::Rejected(serde_json::Value::Null);
                decide(definition, state, &Event::Reply(Reply { command: *command, attempt: *attempt, answer }), now)
            }
            _ => decide(definition, state, event, now),
        }),
        ("silence is taken for a rejection", |definition, state, event, now| match (event, state.open()) {
            (Event::Due, Some(open)) if open.wait == Wait::Reply && state.failure.is_none() => {
                let command = command_id(definition, state, open.step, open.op);
                let answer = Answer::Rejected(serde_json::Value::Null);
                decide(definition, state, &Event::Reply(Reply { command, attempt: open.attempt, answer }), now)
            }
            _ => decide(definition, state, event, now),
        }),
        ("a pause has no end", |definition, state, event, now| {
            let (mut state, effects) = decide(definition, state, event, now);
            if let Status::Running { open } | Status::Compensating { open } = &mut state.status
                && open.wait == Wait::Pause
            {
                open.due = None;
            }
            (state, effects)
        }),
        ("a late success revives what is being undone", |definition, state, event, now| match event {
            Event::Reply(Reply { answer: Answer::Succeeded(_), .. }) if state.failure.is_some() => {
                let mut revived = state.clone();
                if let Status::Compensating { open } = state.status {
                    revived.status = Status::Running { open: saga_core::saga::state::Open { op: Op::Do, ..open } };
                    revived.failure = None;
                }
                decide(definition, &revived, event, now)
            }
            _ => decide(definition, state, event, now),
        }),
        ("a deadline that has passed counts only when the timers look", |definition, state, event, now| {
            let now = if matches!(event, Event::Reply(_)) { OffsetDateTime::UNIX_EPOCH } else { now };
            decide(definition, state, event, now)
        }),
        ("a cancel is taken after the pivot's command was issued", |definition, state, event, now| {
            let (after, effects) = decide(definition, state, event, now);
            if matches!(event, Event::Cancel { .. })
                && state.failure.is_none()
                && !state.is_finished()
                && after == *state
            {
                let mut earlier = state.clone();
                earlier.steps.pop();
                if let Status::Running { open } = &mut earlier.status {
                    open.step -= 1;
                }
                return decide(definition, &earlier, event, now);
            }
            (after, effects)
        }),
    ]
}

#[test]
fn every_seeded_mistake_is_found_and_its_schedule_replays() {
    let order = definition(&ORDER, 2, HOUR);
    for (mistake, wrong) in mistakes().into_iter().chain(mistakes_of_sending()) {
        let limits = Limits { external: false, ..EVERYTHING };
        let model = Model::new(&order, limits, wrong);
        let violation = model.walk(1_000_000).err().unwrap_or_else(|| panic!("not found: {mistake}"));
        println!("{mistake}: {violation}");
        let replayed = model.replay(&violation.schedule).unwrap_err();
        assert_eq!(replayed.rule, violation.rule, "{mistake}");
        let right = Model::new(&order, limits, decide);
        let fine = right.replay(&violation.schedule[..violation.schedule.len() - 1]);
        assert!(fine.is_ok(), "{mistake}: the right one has no trouble with it");
    }
}

#[test]
fn a_lost_fence_leaves_no_effect_behind_that_the_saga_calls_undone() {
    let order = definition(&ORDER, 1, None);
    for external in [false, true] {
        let limits = Limits { attempts: 1, breaks: 0, losses: 1, external, ..EVERYTHING };
        explored(&format!("an order whose fence is lost, external: {external}"), &order, limits);
    }
    let trusting = Limits { breaks: 0, losses: 1, mistake: Some(Mistake::TakesAbsenceForProof), ..EVERYTHING };
    let violation = Model::new(&order, trusting, decide).walk(2_000_000).expect_err("absence is no proof");
    println!("absence is taken for proof: {violation}");
    assert!(violation.schedule.iter().any(|by| matches!(by, ExplorerStep::Lose(_))), "{violation}");
}

#[test]
fn an_undo_that_does_not_wait_for_a_slow_call_is_found() {
    let order = definition(&ORDER, 1, None);
    let hasty = Limits { breaks: 0, mistake: Some(Mistake::UndoesDuringTheCall), ..EVERYTHING };
    let violation = Model::new(&order, hasty, decide).walk(2_000_000).expect_err("the call gets there later");
    println!("an undo does not wait: {violation}");
    assert!(violation.schedule.iter().any(|by| matches!(by, ExplorerStep::Deliver(_, Op::Undo, ..))), "{violation}");
}

#[test]
fn a_saga_ends_beside_one_that_cannot_be_read_which_is_left_as_it_is() {
    let order = definition(&ORDER, 1, HOUR);
    let limits = Limits { breaks: 0, external: false, ..EVERYTHING };
    let beside = |divide| Model::new(&order, limits, decide).beside_an_unreadable_saga(divide);
    let alone = Model::new(&order, limits, decide).walk(1_000_000).unwrap();
    assert_eq!(beside(divide).walk(1_000_000).unwrap().worlds(), alone.worlds(), "it changes nothing");
    let mistakes: [(&str, Divide); 3] = [
        ("one fails all", |read| {
            read.into_iter().collect::<Result<_, _>>().map_or_else(|()| (vec![], vec![(); 2]), |all| (all, vec![]))
        }),
        ("it is decided all the same", |read| (vec![(); read.len()], vec![])),
        ("it is forgotten", |read| (read.into_iter().flatten().collect(), vec![])),
    ];
    for (mistake, wrong) in mistakes {
        let violation = beside(wrong).walk(1_000_000).err().unwrap_or_else(|| panic!("not found: {mistake}"));
        println!("{mistake}: {violation}");
    }
}

#[test]
fn a_step_that_is_undone_elsewhere_is_found_and_no_engine_takes_it() {
    let order = definition(&[Shape::StepUndoneElsewhere, Shape::Pivot], 1, None);
    let limits = Limits { breaks: 0, external: false, ..EVERYTHING };
    let violation = Model::new(&order, limits, decide).walk(1_000_000).expect_err("the effect is left");
    println!("undone elsewhere: {violation}");
    let [error] = &order.check()[..] else { panic!("{:?}", order.check()) };
    let says = "saga `explored`, step `s0`: its command goes to topic `explored` and its undo to `elsewhere`; \
        both go to one topic";
    assert_eq!(error.to_string(), says);
}

/// Takes a path through worlds that are too many to visit: each choice picks one of the events that can happen.
fn take_a_path(definition: &Definition, limits: Limits, choices: &[u16]) -> Result<(), TestCaseError> {
    let model = Model::new(definition, limits, decide);
    let mut world = model.begin().map_err(|violation| TestCaseError::fail(violation.to_string()))?;
    let mut schedule = Vec::new();
    for choice in choices {
        let next_steps = model.next_steps(&world);
        let Some(next) = next_steps.get(usize::from(*choice) % next_steps.len().max(1)) else { break };
        schedule.push(*next);
        world = model
            .take(&world, *next)
            .map_err(|violation| TestCaseError::fail(format!("broken: {}; replay {schedule:?}", violation.rule)))?;
    }
    Ok(())
}

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let before = prop::sample::select(vec![
        Shape::Local,
        Shape::LocalWithUndo,
        Shape::Step,
        Shape::Step,
        Shape::StepWithoutUndo,
    ]);
    let after = prop::sample::select(vec![Shape::Local, Shape::Then]);
    (prop::collection::vec(before, 1..5), any::<bool>(), prop::collection::vec(after, 0..3)).prop_map(
        |(mut shapes, pivot, after)| {
            if pivot {
                shapes.push(Shape::Pivot);
                shapes.extend(after);
            }
            shapes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500,
        failure_persistence: Some(Box::new(proptest::test_runner::FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn an_order_keeps_every_rule_on_random_paths(choices in prop::collection::vec(any::<u16>(), 0..120)) {
        take_a_path(&definition(&ORDER, 3, HOUR), Limits { attempts: 3, breaks: 2, losses: 2, ..EVERYTHING }, &choices)?;
    }

    #[test]
    fn generated_definitions_keep_every_rule_on_random_paths(
        shapes in shapes(),
        attempts in 1_u32..=3,
        choices in prop::collection::vec(any::<u16>(), 0..120),
        external: bool,
    ) {
        let generated = definition(&shapes, attempts, HOUR);
        take_a_path(&generated, Limits { attempts: 3, breaks: 2, losses: 2, external, ..EVERYTHING }, &choices)?;
    }

    #[test]
    fn what_is_stored_is_what_was_decided(
        shapes in shapes(),
        choices in prop::collection::vec(any::<u16>(), 0..60),
    ) {
        let generated = definition(&shapes, 2, HOUR);
        let model = Model::new(&generated, EVERYTHING, through_json);
        let mut world = model.begin().map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        for choice in choices {
            let next_steps = model.next_steps(&world);
            let Some(next) = next_steps.get(usize::from(choice) % next_steps.len().max(1)) else { break };
            world = model.take(&world, *next).map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        }
    }
}

/// `decide` by way of the database: the state is written and read again before and after.
fn through_json(definition: &Definition, state: &State, event: &Event, now: OffsetDateTime) -> (State, Effects) {
    let stored = |state: &State| {
        let text = serde_json::to_string(state).unwrap();
        let read = State { saga: state.saga, ..serde_json::from_str(&text).unwrap() };
        assert_eq!(&read, state, "{text}");
        read
    };
    let (after, effects) = decide(definition, &stored(state), event, now);
    (stored(&after), effects)
}
