//! The typed builder. A saga that breaks the rules does not compile: see `saga-core/tests/compile_fail`.

use super::{
    And, BuildError, BuildFrom, Call, Definition, Remote, Replies, RetryPolicy, Saga, Step, StepKind, StepRole,
};
use crate::{
    command::{Command, Happened, Never},
    json::Named,
    topic::Topic,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{marker::PhantomData, sync::Arc, time::Duration};

/// How long one attempt may stay without an answer unless the step says otherwise.
const DEFAULT_STEP_DEADLINE: Duration = Duration::from_secs(30);

/// Begins the definition of a saga whose input is an `I`. Read from top to bottom, it is what the saga does:
///
/// ```
/// # use saga_core::{command::{Command, Done, Never}, saga::{saga, Saga, Happened}, topic::Topic};
/// # use serde::{Serialize, Deserialize};
/// # static SHOP: Topic = Topic::events("shop.commands", 1);
/// # macro_rules! command { ($name:ident, $kind:literal, $rejection:ty) => {
/// #   #[derive(Serialize, Deserialize)] struct $name { id: u32 }
/// #   impl Command for $name {
/// #     const TYPE: &'static str = $kind; const TOPIC: &'static Topic = &SHOP; type Reply = Done; type Rejection = $rejection;
/// #   } } }
/// # command!(HoldMoney, "hold.v1", String);
/// # command!(LetMoneyGo, "let-go.v1", Never);
/// # command!(TakeMoney, "take.v1", String);
/// # command!(Ship, "ship.v1", Never);
/// # #[derive(Serialize, Deserialize)] struct Order { id: u32 }
/// fn order() -> Saga<Order> {
///     saga::<Order>("order", 1)
///         .local_with_undo("open order", "cancel order")
///         .step("hold money", |order, ()| HoldMoney { id: order.id })
///         .undo(|order, (), _happened| LetMoneyGo { id: order.id })
///         .pivot("take money", |order, (_held,)| TakeMoney { id: order.id })
///         .then("ship", |order, (_held, _taken)| Ship { id: order.id })
///         .local("close order")
///         .build()
/// }
/// # assert_eq!(order().steps().len(), 5);
/// ```
pub fn saga<I>(name: impl Into<String>, version: u32) -> SagaBuilder<I, (), BeforePivot>
where
    I: Serialize + DeserializeOwned + Send + Sync + 'static,
{
    let (steps, local_retry) = (Vec::new(), RetryPolicy::LOCAL);
    SagaBuilder { name: name.into(), version, steps, deadline: None, local_retry, types: PhantomData }
}

/// A saga in the making: input `I`, replies so far `R`, and where it stands to its pivot.
#[must_use = "a saga is defined when `.build()` is called"]
pub struct SagaBuilder<I, R, P> {
    name: String,
    version: u32,
    steps: Vec<Step>,
    deadline: Option<Duration>,
    local_retry: RetryPolicy,
    types: PhantomData<fn(I, R, P)>,
}

/// A step without its undo yet: `.undo(..)` or `.nothing_to_undo()` has to follow.
#[must_use = "say how the step is undone: `.undo(..)` or `.nothing_to_undo()`"]
pub struct UndoUndecided<I, R, C> {
    saga: SagaBuilder<I, R, BeforePivot>,
    name: String,
    remote: Remote,
    command: PhantomData<fn(C)>,
}

/// The pivot is still to come.
pub enum BeforePivot {}
/// The pivot stands, and the last step was local.
pub enum AfterPivot {}
/// The pivot stands, and the last step was a command, whose deadline and retries can be set.
pub enum AfterPivotCommand {}

/// Where steps may stand that can be refused or undone.
#[diagnostic::on_unimplemented(
    message = "after the pivot nothing is undone, so nothing that can be refused or undone may stand there",
    label = "stands after the pivot",
    note = "after the pivot use `.then(..)`, with a command that cannot be refused (`type Rejection = Never`), or `.local(..)`"
)]
pub trait BeforeThePivot {}
impl BeforeThePivot for BeforePivot {}

/// Where a pivot may stand.
#[diagnostic::on_unimplemented(
    message = "a saga has one pivot, and this one has it already",
    label = "a second pivot",
    note = "after the pivot use `.then(..)`, with a command that cannot be refused (`type Rejection = Never`), or `.local(..)`"
)]
pub trait NoPivotYet {}
impl NoPivotYet for BeforePivot {}

/// Where steps may stand that are only ever retried.
#[diagnostic::on_unimplemented(
    message = "`.then(..)` stands after the pivot, and this saga has none yet",
    label = "stands before the pivot",
    note = "before the pivot use `.step(..)` and say how it is undone, or make this step the `.pivot(..)`"
)]
pub trait HasPivot {}
impl HasPivot for AfterPivot {}
impl HasPivot for AfterPivotCommand {}

/// The rejection of a command that undoes: there is none.
#[diagnostic::on_unimplemented(
    message = "an undo cannot be refused, but this command can be (with `{Self}`)",
    label = "builds a command that can be refused",
    note = "give the command `type Rejection = saga_core::command::Never`"
)]
pub trait NeverRefusedUndo {}
impl NeverRefusedUndo for Never {}

/// The rejection of a command after the pivot: there is none.
#[diagnostic::on_unimplemented(
    message = "a step after the pivot cannot be refused, but this command can be (with `{Self}`)",
    label = "builds a command that can be refused",
    note = "give the command `type Rejection = saga_core::command::Never`, or move the step before the pivot"
)]
pub trait NeverRefusedAfterPivot {}
impl NeverRefusedAfterPivot for Never {}

impl<I, R, P> SagaBuilder<I, R, P>
where
    I: Serialize + DeserializeOwned + Send + Sync + 'static,
    R: Replies,
{
    /// A command before the pivot, built from the input and the replies of the steps before it.
    pub fn step<C, F>(self, name: impl Into<String>, command: F) -> UndoUndecided<I, R, C>
    where
        P: BeforeThePivot,
        C: Command,
        R: And<C::Reply>,
        F: Fn(&I, &R) -> C + Send + Sync + 'static,
    {
        let remote = remote::<I, R, C, F>(StepRole::Compensable, RetryPolicy::COMPENSABLE, command);
        UndoUndecided { saga: self.retype(), name: name.into(), remote, command: PhantomData }
    }

    /// The point of no return. Until its command is issued the saga can be cancelled; when it is refused, everything
    /// before is undone; while it is in doubt, the saga waits.
    pub fn pivot<C, F>(self, name: impl Into<String>, command: F) -> SagaBuilder<I, R::With, AfterPivotCommand>
    where
        P: NoPivotYet,
        C: Command,
        R: And<C::Reply>,
        F: Fn(&I, &R) -> C + Send + Sync + 'static,
    {
        self.push_remote(name.into(), remote::<I, R, C, F>(StepRole::Pivot, RetryPolicy::PIVOT, command))
    }

    /// A command after the pivot: it cannot be refused, and is retried until it is done.
    pub fn then<C, F>(self, name: impl Into<String>, command: F) -> SagaBuilder<I, R::With, AfterPivotCommand>
    where
        P: HasPivot,
        C: Command,
        C::Rejection: NeverRefusedAfterPivot,
        R: And<C::Reply>,
        F: Fn(&I, &R) -> C + Send + Sync + 'static,
    {
        self.push_remote(name.into(), remote::<I, R, C, F>(StepRole::Retriable, RetryPolicy::RETRIABLE, command))
    }

    /// An effect in the orchestrator's own database that is not taken back when the saga is undone. The engine is given
    /// the effect by this name.
    pub fn local(self, effect: impl Into<String>) -> SagaBuilder<I, R, <P as AfterLocal>::Phase>
    where
        P: AfterLocal,
    {
        let mut next = self.retype();
        next.steps.push(local(effect.into(), None));
        next
    }

    /// An effect in the orchestrator's own database, and the one that takes it back.
    pub fn local_with_undo(mut self, effect: impl Into<String>, undo: impl Into<String>) -> Self
    where
        P: BeforeThePivot,
    {
        self.steps.push(local(effect.into(), Some(undo.into())));
        self
    }

    /// How long the saga may take until its pivot's command is issued; then the engine undoes it, as after a cancel.
    pub fn saga_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// How the saga's local effects, all of them, are tried again when they failed by their own fault
    /// ([`RetryPolicy::LOCAL`]). After the last attempt the saga is stuck.
    pub fn local_retry(mut self, policy: RetryPolicy) -> Self {
        self.local_retry = policy;
        self
    }

    /// The definition, ready for the engine.
    pub fn build(mut self) -> Saga<I> {
        for step in &mut self.steps {
            if let StepKind::Local { retry, .. } = &mut step.kind {
                *retry = self.local_retry;
            }
        }
        let definition = Definition::new(self.name, self.version, self.steps, self.deadline);
        Saga { definition: Arc::new(definition), input: PhantomData }
    }

    fn push_remote<N, Q>(self, name: String, remote: Remote) -> SagaBuilder<I, N, Q> {
        let mut next = self.retype();
        next.steps.push(Step { name, kind: StepKind::Remote(Box::new(remote)) });
        next
    }

    fn retype<N, Q>(self) -> SagaBuilder<I, N, Q> {
        let Self { name, version, steps, deadline, local_retry, types: _ } = self;
        SagaBuilder { name, version, steps, deadline, local_retry, types: PhantomData }
    }
}

impl<I, R> SagaBuilder<I, R, AfterPivotCommand> {
    /// How long one attempt of the step before may stay without an answer.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.last().deadline = deadline;
        self
    }

    /// How the command of the step before is resent.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.last().retry = policy;
        self
    }

    fn last(&mut self) -> &mut Remote {
        match self.steps.last_mut().map(|step| &mut step.kind) {
            Some(StepKind::Remote(remote)) => remote,
            _ => unreachable!("the type says that the last step is a command"),
        }
    }
}

impl<I, R, C> UndoUndecided<I, R, C>
where
    I: Serialize + DeserializeOwned + Send + Sync + 'static,
    C: Command,
    R: And<C::Reply>,
{
    /// How long one attempt, of the command or its undo, may stay without an answer.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.remote.deadline = deadline;
        self
    }

    /// How the command is resent. After the last attempt the saga is undone, this step as in doubt.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.remote.retry = policy;
        self
    }

    /// How the undo is resent. After the last attempt the saga is stuck.
    pub fn undo_retry(mut self, policy: RetryPolicy) -> Self {
        self.remote.undo_retry = policy;
        self
    }

    /// The command that undoes the step, built from the input, the replies before the step, and what is known of it. It
    /// goes to the topic of the step's command, or it is not compiled: elsewhere no participant knows what there is to
    /// undo, and nothing keeps the two in their order.
    pub fn undo<U, F>(mut self, command: F) -> SagaBuilder<I, R::With, BeforePivot>
    where
        U: Command,
        U::Rejection: NeverRefusedUndo,
        F: Fn(&I, &R, Happened<&C::Reply>) -> U + Send + Sync + 'static,
    {
        const { assert!(same(C::TOPIC, U::TOPIC), "an undo goes to the topic of the step that it undoes") };
        self.remote.undo = Some(call::<U>(Arc::new(move |from: BuildFrom<'_>| {
            let (input, replies) = read::<I, R>(from)?;
            let reply = from.happened.map(C::Reply::deserialize).transpose();
            let reply = reply.map_err(|source| BuildError { what: "read the reply of the step to undo", source })?;
            let happened = reply.as_ref().map_or(Happened::InDoubt, Happened::Yes);
            write(&command(&input, &replies, happened))
        })));
        self.saga.push_remote(self.name, self.remote)
    }

    /// The step has no effect that would have to be undone.
    pub fn nothing_to_undo(self) -> SagaBuilder<I, R::With, BeforePivot> {
        self.saga.push_remote(self.name, self.remote)
    }
}

/// Where a saga stands to its pivot after a local step.
pub trait AfterLocal {
    /// The builder's phase after the local step.
    type Phase;
}
impl AfterLocal for BeforePivot {
    type Phase = Self;
}
impl AfterLocal for AfterPivot {
    type Phase = Self;
}
impl AfterLocal for AfterPivotCommand {
    type Phase = AfterPivot;
}

fn local(name: String, undo: Option<String>) -> Step {
    Step { name, kind: StepKind::Local { undo, retry: RetryPolicy::LOCAL } }
}

fn remote<I, R, C, F>(role: StepRole, retry: RetryPolicy, command: F) -> Remote
where
    I: DeserializeOwned,
    R: Replies,
    C: Command,
    F: Fn(&I, &R) -> C + Send + Sync + 'static,
{
    let action = call::<C>(Arc::new(move |from: BuildFrom<'_>| {
        let (input, replies) = read::<I, R>(from)?;
        write(&command(&input, &replies))
    }));
    Remote { role, action, undo: None, deadline: DEFAULT_STEP_DEADLINE, retry, undo_retry: RetryPolicy::UNDO }
}

fn call<C: Command>(build: Arc<super::Build>) -> Call {
    Call {
        kind: C::TYPE,
        topic: C::TOPIC.name,
        build,
        check_reply: Arc::new(|value| C::Reply::deserialize(Named(value)).map(drop)),
        check_rejection: Arc::new(|value| C::Rejection::deserialize(Named(value)).map(drop)),
    }
}

fn read<I: DeserializeOwned, R: Replies>(from: BuildFrom<'_>) -> Result<(I, R), BuildError> {
    let input = I::deserialize(from.input).map_err(|source| BuildError { what: "read the saga's input", source })?;
    let replies = R::decode(from.replies).map_err(|source| BuildError { what: "read the earlier replies", source })?;
    Ok((input, replies))
}

fn write<C: Command>(command: &C) -> Result<Vec<u8>, BuildError> {
    serde_json::to_vec(command).map_err(|source| BuildError { what: "write the command", source })
}

/// Whether two topics have one name. A `const fn`, because constants cannot compare texts with `==` yet.
const fn same(a: &Topic, b: &Topic) -> bool {
    let (a, b) = (a.name.as_bytes(), b.name.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}
