//! Fault injection at transaction edges: a process that dies there, an error there, or success that nobody hears of.
//!
//! A fail point is a name in this crate's code (`fail_point!`, see `fail_point.rs`) and a *scope* that tells one instance from
//! another (a consumer group, a participant, an engine), so that tests that run side by side do not hit each other.
//! Whether the edge comes before or after a commit is what the name says: `after-commit` with [`Fault::Error`] is "it
//! ran, then there was an error".
//!
//! Processes of a crash test are told by the environment: `FAILPOINTS="consumer.after-commit=3*off->1*return(kill)"`
//! (the syntax of the `fail` crate) hits every scope, `consumer.after-commit@payment-svc=…` one.
//!
//! | name | scope | edge |
//! |---|---|---|
//! | `consumer.before-begin` | group | a batch is taken, its transaction not begun |
//! | `consumer.after-inbox` | group | the inbox rows are written, the handler not called |
//! | `consumer.before-commit` | group | the handler is done |
//! | `consumer.after-commit` | group | committed, and the process does not know |
//! | `consumer.before-store` | group | committed and known, the offsets not stored |
//! | `consumer.after-attempt` | group | an attempt at a single record is counted, and not yet made |
//! | `participant.before-call` | participant | an intent is claimed, nobody called |
//! | `participant.after-call` | participant | the call was made, and nobody remembers its answer |
//! | `participant.before-settle-commit` | participant | the answer is recorded and replied to, not committed |
//! | `participant.after-settle-commit` | participant | committed, and the process does not know |
//! | `saga.after-load` | reply topic | the sagas of a batch of replies are locked, nothing is decided |
//! | `saga.after-store` | reply topic | a batch of replies is decided and written, not committed |
//! | `saga.before-start` | reply topic | sagas that start by themselves are written, not committed |
//! | `saga.timers.before-commit` | reply topic | due sagas are decided and written |
//! | `saga.timers.after-commit` | reply topic | committed, and the timers do not know |

use std::sync::Once;

/// What happens at a fail point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error of the kind that counts as the record's own fault.
    Error,
    /// An error of the kind that a lost database connection makes: repeated, counted nowhere.
    Outage,
    /// In process: whoever hits it stops at once, without cleaning up, as if the process had died.
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

/// What a fail point returns when it is armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("fail point: {0:?}")]
pub struct Injected(pub Fault);

impl From<Injected> for sqlx::Error {
    fn from(injected: Injected) -> Self {
        match injected.0 {
            Fault::Outage => Self::Io(std::io::Error::new(std::io::ErrorKind::ConnectionReset, injected)),
            _ => Self::Encode(Box::new(injected)),
        }
    }
}

/// An armed fail point; disarmed when dropped.
#[derive(Debug)]
pub struct FailPoint {
    key: String,
}

impl FailPoint {
    /// Arms `name` in `scope`: the first `skip` passages go through, the next `times` get `fault`.
    pub fn arm(name: &str, scope: &str, fault: Fault, skip: usize, times: usize) -> Self {
        let key = format!("{name}@{scope}");
        let skipped = if skip == 0 { String::new() } else { format!("{skip}*off->") };
        fail::cfg(&key, &format!("{skipped}{times}*return({})->off", fault.as_str())).expect("the syntax is fixed");
        Self { key }
    }

    /// Arms `name` in `scope` for its next passage.
    pub fn once(name: &str, scope: &str, fault: Fault) -> Self {
        Self::arm(name, scope, fault, 0, 1)
    }
}

impl Drop for FailPoint {
    fn drop(&mut self) {
        fail::remove(&self.key);
    }
}

/// Passes a fail point. Called through `fail_point!`.
///
/// # Errors
/// When it is armed, by a test or by `FAILPOINTS`.
pub fn pass(name: &str, scope: &str) -> Result<(), Injected> {
    static ENVIRONMENT: Once = Once::new();
    ENVIRONMENT.call_once(|| {
        for (key, actions) in std::env::var("FAILPOINTS").iter().flat_map(|all| all.split(';')).filter_map(split) {
            fail::cfg(key, actions).unwrap_or_else(|error| panic!("FAILPOINTS, {key}: {error}"));
        }
    });
    let scoped = format!("{name}@{scope}");
    match fail::eval(&scoped, |fault| fault).or_else(|| fail::eval(name, |fault| fault)).map(Option::unwrap_or_default)
    {
        None => Ok(()),
        Some(fault) if fault == "kill" => std::process::abort(),
        Some(fault) if fault == "crash" => Err(Injected(Fault::Crash)),
        Some(fault) if fault == "outage" => Err(Injected(Fault::Outage)),
        Some(_) => Err(Injected(Fault::Error)),
    }
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
}
