//! Fault injection at transaction edges: the process dies there, an error comes, or a success does not reach the
//! caller.
//!
//! A fail point is a name in this crate's code (`fail_point!`, see `fail_point.rs`) and a *scope*. The scope
//! distinguishes instances (a consumer group, a participant, an engine), so that tests that run side by side do not hit
//! each other. The name says whether the edge comes before or after a commit: `after-commit` with [`Fault::Error`]
//! means that the commit ran and then an error came.
//!
//! Processes of a crash test read the environment variable `FAILPOINTS`, in the syntax of the `fail` crate.
//! `FAILPOINTS="consumer.after-commit=3*off->1*return(kill)"` hits every scope, `consumer.after-commit@payment-svc=…`
//! one. `consumer.after-commit@payment-svc/undo authorize-payment=…` hits one step there, by itself or with others in
//! its batch. Where some messages are to be let through, those of a batch count one by one.
//!
//! A fault that never fires proves nothing, and a test cannot distinguish it from one that was survived. So a
//! [`FailPoint`] that fired less often than it was armed for fails its test when it is dropped. Each fault that fires
//! is a warning in the log ([`FIRES`], with the field `fail_point`), by which a test counts another process's faults.
//!
//! A scope with `/step` can be narrowed to one step.
//!
//! | name | scope | edge |
//! |---|---|---|
//! | `consumer.before-begin` | group/step | a batch is taken, its transaction not begun |
//! | `consumer.after-inbox` | group/step | the inbox rows are written, the handler not called |
//! | `consumer.before-commit` | group/step | the handler is done |
//! | `consumer.after-commit` | group/step | committed, and the process does not know |
//! | `consumer.before-store` | group | committed and known, the offsets not stored |
//! | `consumer.after-note` | group | a batch is noted after an unclean stop, and not yet tried |
//! | `consumer.after-attempt` | group | an attempt at a single record is counted, and not yet made |
//! | `consumer.before-read-until` | group | how far a partition has been read is known, and not written |
//! | `participant.before-call` | participant/step | an intent is claimed, the call not made |
//! | `participant.after-call` | participant/step | the call was made, and its answer is not stored |
//! | `participant.before-settle-commit` | participant/step | the answer is recorded and replied to, not committed |
//! | `participant.after-settle-commit` | participant/step | committed, and the process does not know |
//! | `saga.after-load` | reply topic | the sagas of a batch of replies are locked, nothing is decided |
//! | `saga.after-store` | reply topic | a batch of replies is decided and written, not committed |
//! | `saga.before-start` | reply topic | sagas that start by themselves are written, not committed |
//! | `saga.timers.before-commit` | reply topic | sagas that were due are decided and written |
//! | `saga.timers.after-commit` | reply topic | committed, and the timers do not know |
//! | `outbox.before-commit` | database | a transaction of a service's own is done ([`outbox::commit`](crate::outbox::commit)) |
//! | `outbox.after-commit` | database | committed, and the service does not know |

use crate::envelope::SagaHeaders;
use std::{
    collections::BTreeMap,
    panic::Location,
    sync::{Mutex, MutexGuard, Once, PoisonError},
};

/// The log message of each fault that fires.
pub const FIRES: &str = "a fail point fires";

/// What happens at a fail point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error of the kind that counts as the record's own fault.
    Error,
    /// An error of the kind that a lost database connection makes: repeated, counted nowhere.
    Outage,
    /// In process: the caller stops at once, without cleaning up, as if the process had died.
    Crash,
    /// The process aborts.
    Kill,
}

impl Fault {
    fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Outage => "outage",
            Self::Crash => "crash",
            Self::Kill => "kill",
        }
    }
}

/// The error that an armed fail point returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("fail point: {0:?}")]
pub struct Injected(pub Fault);

impl From<Injected> for sqlx::Error {
    fn from(injected: Injected) -> Self {
        match injected.0 {
            Fault::Error => Self::Encode(Box::new(injected)),
            // A crash is an outage too: an error that counts as a record's own fault is handled, and a dead process
            // handles nothing.
            Fault::Outage | Fault::Crash | Fault::Kill => {
                Self::Io(std::io::Error::new(std::io::ErrorKind::ConnectionReset, injected))
            }
        }
    }
}

/// How often the points that are armed in this process have fired, by key.
static FIRED: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

fn fired() -> MutexGuard<'static, BTreeMap<String, usize>> {
    FIRED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An armed fail point. Dropping it disarms it, and panics if it has not fired as often as it was armed for.
#[derive(Debug)]
#[must_use = "it is disarmed when it is dropped"]
pub struct FailPoint {
    key: String,
    times: usize,
    armed_at: &'static Location<'static>,
}

impl FailPoint {
    /// Arms `name` in `scope`: the first `skip` passages go through, the next `times` get `fault`.
    #[track_caller]
    pub fn arm(name: &str, scope: &str, fault: Fault, skip: usize, times: usize) -> Self {
        let key = format!("{name}@{scope}");
        let skipped = if skip == 0 { String::new() } else { format!("{skip}*off->") };
        fail::cfg(&key, &format!("{skipped}{times}*return({})->off", fault.as_str())).expect("the syntax is fixed");
        fired().insert(key.clone(), 0);
        Self { key, times, armed_at: Location::caller() }
    }

    /// Arms `name` in `scope` for its next passage.
    #[track_caller]
    pub fn once(name: &str, scope: &str, fault: Fault) -> Self {
        Self::arm(name, scope, fault, 0, 1)
    }

    /// Whether the point has fired as often as it was armed for.
    pub fn has_fired(&self) -> bool {
        fired().get(&self.key).is_some_and(|fired| *fired >= self.times)
    }
}

impl Drop for FailPoint {
    fn drop(&mut self) {
        fail::remove(&self.key);
        let fired = fired().remove(&self.key).unwrap_or_default();
        let Self { key, times, armed_at } = self;
        // A test that fails already has its own message.
        let silent = std::thread::panicking();
        assert!(silent || fired >= *times, "{armed_at}: {key} was to fire {times} times, and fired {fired} times");
    }
}

/// Passes a fail point. Called through `fail_point!`.
///
/// # Errors
/// When it is armed, by a test or by `FAILPOINTS`.
pub fn pass(name: &str, scope: &str) -> Result<(), Injected> {
    pass_with(name, scope, [])
}

/// Passes a fail point where the steps that pass it are known.
///
/// # Errors
/// When it is armed, for one of the steps or for any.
pub fn pass_with<'a>(
    name: &str,
    scope: &str,
    sagas: impl IntoIterator<Item = &'a SagaHeaders>,
) -> Result<(), Injected> {
    static ENVIRONMENT: Once = Once::new();
    ENVIRONMENT.call_once(|| {
        for (key, actions) in std::env::var("FAILPOINTS").iter().flat_map(|all| all.split(';')).filter_map(split) {
            fail::cfg(key, actions).unwrap_or_else(|error| panic!("FAILPOINTS, {key}: {error}"));
        }
    });
    let scoped = format!("{name}@{scope}");
    let steps = sagas.into_iter().map(|saga| format!("{scoped}/{} {}", saga.op.as_str(), saga.step));
    let mut keys = steps.chain([scoped.clone(), name.to_owned()]);
    let Some((key, fault)) = keys.find_map(fault_at) else { return Ok(()) };
    tracing::warn!(fail_point = key, fault, "{FIRES}");
    if let Some(count) = fired().get_mut(&key) {
        *count += 1;
    }
    match fault.as_str() {
        "kill" => std::process::abort(),
        "crash" => Err(Injected(Fault::Crash)),
        "outage" => Err(Injected(Fault::Outage)),
        _ => Err(Injected(Fault::Error)),
    }
}

fn fault_at(key: String) -> Option<(String, String)> {
    let fault = fail::eval(&key, Option::unwrap_or_default)?;
    Some((key, fault))
}

fn split(setting: &str) -> Option<(&str, &str)> {
    setting.trim().split_once('=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_armed_point_fails_as_often_as_told_and_only_in_its_scope() {
        let scope = crate::testkit::unique("scope");
        let armed = FailPoint::arm("test.point", &scope, Fault::Crash, 1, 2);
        let passages: Vec<_> = (0..4).map(|_| pass("test.point", &scope).is_ok()).collect();
        assert_eq!(passages, [true, false, false, true]);
        assert!(pass("test.point", "elsewhere").is_ok());
        drop(armed);
        assert!(pass("test.point", &scope).is_ok());
    }

    #[test]
    #[should_panic(expected = "was to fire 1 times, and fired 0 times")]
    fn a_point_that_nobody_passes_fails_the_test_that_armed_it() {
        let scope = crate::testkit::unique("scope");
        let _armed = FailPoint::once("test.point", &scope, Fault::Error);
        assert!(pass("test.point", "elsewhere").is_ok());
    }

    #[test]
    #[should_panic(expected = "was to fire 2 times, and fired 1 times")]
    fn a_point_that_fires_less_often_than_it_was_armed_for_fails_the_test_too() {
        let scope = crate::testkit::unique("scope");
        let _armed = FailPoint::arm("test.point", &scope, Fault::Error, 1, 2);
        let passages: Vec<_> = (0..2).map(|_| pass("test.point", &scope).is_ok()).collect();
        assert_eq!(passages, [true, false]);
    }

    #[test]
    #[should_panic(expected = "another reason")]
    fn a_test_that_fails_already_keeps_its_reason() {
        let scope = crate::testkit::unique("scope");
        let _armed = FailPoint::once("test.point", &scope, Fault::Error);
        panic!("another reason");
    }
}
