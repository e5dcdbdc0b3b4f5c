//! Many sagas in one transaction: each takes its events in order, in memory; then all are written at once.
//!
//! The batch runs local effects where `decide` asks for them: for all sagas that stand at one together, behind one
//! savepoint. If that fails, it runs them one by one, each behind a savepoint of its own. So only the saga whose effect
//! fails has to wait, or becomes stuck. An error that is not an effect's own fault repeats the batch. The batch is in
//! memory only: when the process dies, its transaction has committed or it has not.

use super::{
    engine::Engine,
    loaded_saga::{LoadedSaga, LocalToRun},
    local::{LocalCall, LocalError},
    measure,
    state::Event,
    store::{self, SagaUpdate},
};
use crate::{
    clock,
    consumer::Unfit,
    error_class::{ErrorClass, Found, classify, classify_chain, find},
    id::{MessageId, SagaId},
    outbox::Tx,
    panics::panic_text,
    reason::chain,
};
use futures::FutureExt;
use sqlx::Acquire;
use std::{collections::BTreeMap, panic::AssertUnwindSafe};
use time::OffsetDateTime;

/// Why a transaction's sagas were not decided.
#[derive(Debug, thiserror::Error)]
pub(super) enum BatchError {
    /// The database returned an error.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// A local effect met an error of the database that is not its own fault, and wrapped it in a text of its own.
    #[error("a local effect: {}", chain(.0))]
    Effect(anyhow::Error),
    /// A reply that answers its saga's open command cannot be understood.
    #[error("{0}")]
    Poison(String, Option<MessageId>),
    /// Replies that no saga here can take.
    #[error("{} replies belong to no saga here", .0.len())]
    Unfit(Vec<Unfit>),
}

impl BatchError {
    /// Converts to the only error type that some callers know.
    pub(super) fn into_database(self) -> sqlx::Error {
        match self {
            Self::Database(error) => error,
            Self::Effect(error) => sqlx::Error::Io(std::io::Error::other(chain(&error))),
            Self::Poison(why, _) => sqlx::Error::InvalidArgument(why),
            unfit @ Self::Unfit(_) => sqlx::Error::InvalidArgument(unfit.to_string()),
        }
    }

    /// The error's class: whether the work that met it is at fault.
    pub(super) fn class(&self) -> ErrorClass {
        self.database().map_or(ErrorClass::Own, Found::class)
    }

    /// The database's error behind this one, however a local effect has wrapped it.
    pub(super) fn database(&self) -> Option<Found<'_>> {
        match self {
            Self::Database(error) => Some(Found::Error(error)),
            Self::Effect(error) => find(error.as_ref()),
            Self::Poison(..) | Self::Unfit(_) => None,
        }
    }
}

#[cfg(feature = "testkit")]
impl From<crate::testkit::failpoints::Injected> for BatchError {
    fn from(injected: crate::testkit::failpoints::Injected) -> Self {
        Self::Database(injected.into())
    }
}

/// The sagas of one transaction, sorted by id.
pub(super) struct SagaBatch<'e, 'm> {
    engine: &'e Engine,
    now: OffsetDateTime,
    pub(super) sagas: Vec<LoadedSaga<'m>>,
}

impl<'e, 'm> SagaBatch<'e, 'm> {
    /// Takes the time of the last row lock as the time of the whole batch.
    pub(super) fn new(engine: &'e Engine, mut sagas: Vec<LoadedSaga<'m>>) -> Self {
        sagas.sort_by_key(LoadedSaga::saga);
        let now = sagas.iter().map(LoadedSaga::locked_at).max().unwrap_or_else(clock::now);
        Self { engine, now, sagas }
    }

    /// Decides everything and writes it: a fixed number of statements, and those of the local effects.
    pub(super) async fn run_in(&mut self, tx: &mut Tx<'_>) -> Result<(), BatchError> {
        loop {
            for loaded in &mut self.sagas {
                loaded.decide(self.engine.reply_topic(), self.now)?;
            }
            let at_local: Vec<usize> = (0..self.sagas.len()).filter(|&i| self.sagas[i].pending().is_some()).collect();
            if at_local.is_empty() {
                break;
            }
            self.run_locals_in(tx, &at_local).await?;
        }
        self.run_turned_in(tx).await?;
        self.store_in(tx).await
    }

    /// Runs the service's effect for sagas that have begun to be undone and are not at the end of it.
    async fn run_turned_in(&self, tx: &mut Tx<'_>) -> Result<(), BatchError> {
        let mut turned: BTreeMap<&str, Vec<LocalCall<'_>>> = BTreeMap::new();
        for loaded in self.sagas.iter().filter(|loaded| loaded.has_turned()) {
            turned.entry(loaded.definition().name()).or_default().push(loaded.call_of(loaded.definition().name()));
        }
        for (definition, calls) in turned {
            let Some(effect) = self.engine.turned(definition) else { continue };
            let mut savepoint = tx.begin().await?;
            let ran = AssertUnwindSafe(effect.run_many(&mut savepoint, &calls)).catch_unwind().await;
            let ran =
                ran.unwrap_or_else(|panic| Err(anyhow::anyhow!("it panicked: {}", panic_text(panic.as_ref())).into()));
            match ran {
                Ok(()) => savepoint.commit().await?,
                Err(error) => {
                    savepoint.rollback().await?;
                    let reason = if_its_own(error)?;
                    tracing::error!(
                        saga_type = definition,
                        reason,
                        "the service's effect of sagas that are being undone failed; they go on"
                    );
                }
            }
        }
        Ok(())
    }

    async fn run_locals_in(&mut self, tx: &mut Tx<'_>, at_local: &[usize]) -> Result<(), BatchError> {
        match self.try_behind_a_savepoint_in(tx, at_local).await? {
            Ok(()) => at_local.iter().for_each(|&i| self.settle(i, &Event::LocalDone)),
            Err(error) => {
                let broken = Event::broken(&if_its_own(error)?);
                if let [only] = at_local {
                    self.settle(*only, &broken);
                } else {
                    self.run_one_by_one_in(tx, at_local).await?;
                }
            }
        }
        Ok(())
    }

    /// Keeps all of the effects or none. The inner error is the effect's, the outer one the transaction's.
    async fn try_behind_a_savepoint_in(
        &self,
        tx: &mut Tx<'_>,
        at_local: &[usize],
    ) -> Result<Result<(), LocalError>, sqlx::Error> {
        let mut savepoint = tx.begin().await?;
        match self.try_together_in(&mut savepoint, at_local).await {
            // PostgreSQL refuses the release if the effect swallowed an error of the database. The drop then rolls it
            // back.
            Ok(()) => Ok(savepoint.commit().await.map_err(LocalError::Database)),
            Err(error) => {
                savepoint.rollback().await?;
                Ok(Err(error))
            }
        }
    }

    async fn try_together_in(&self, tx: &mut Tx<'_>, at_local: &[usize]) -> Result<(), LocalError> {
        let mut by_effect: BTreeMap<&str, Vec<LocalCall<'_>>> = BTreeMap::new();
        for call in at_local.iter().filter_map(|&i| self.sagas[i].pending()).map(LocalToRun::call) {
            by_effect.entry(call.name).or_default().push(call);
        }
        for (name, calls) in by_effect {
            let run = async { self.engine.local(name)?.run_many(tx, &calls).await };
            // The effect is the service's code. A panic fails its sagas alone, not the batch and not the timers' task.
            AssertUnwindSafe(run).catch_unwind().await.unwrap_or_else(|panic| {
                let text = panic_text(panic.as_ref());
                Err(anyhow::anyhow!("the local effect `{name}` panicked: {text}").into())
            })?;
        }
        Ok(())
    }

    async fn run_one_by_one_in(&mut self, tx: &mut Tx<'_>, at_local: &[usize]) -> Result<(), BatchError> {
        for &i in at_local {
            let event = match self.try_behind_a_savepoint_in(tx, &[i]).await? {
                Ok(()) => Event::LocalDone,
                Err(error) => Event::broken(&if_its_own(error)?),
            };
            self.settle(i, &event);
        }
        Ok(())
    }

    fn settle(&mut self, loaded: usize, event: &Event) {
        self.sagas[loaded].settle_local(self.engine.reply_topic(), event, self.now);
    }

    async fn store_in(&mut self, tx: &mut Tx<'_>) -> Result<(), BatchError> {
        let with_unexpected_replies: Vec<SagaId> =
            self.sagas.iter().filter(|loaded| loaded.has_unexpected_replies()).map(LoadedSaga::saga).collect();
        if !with_unexpected_replies.is_empty() {
            let unexpected = store::load_unexpected_replies_in(tx, &with_unexpected_replies).await?;
            for loaded in &mut self.sagas {
                loaded.forget(unexpected.get(&loaded.saga()).map_or(&[], Vec::as_slice));
            }
        }
        let messages: Vec<_> = self.sagas.iter_mut().flat_map(|loaded| std::mem::take(&mut loaded.messages)).collect();
        let changes: Vec<SagaUpdate<'_>> = self.sagas.iter().filter_map(|loaded| loaded.change(self.now)).collect();
        let events: Vec<_> = self.sagas.iter().flat_map(LoadedSaga::events).collect();
        store::update_in(tx, &changes, &events, &messages, self.now).await?;
        self.sagas.iter().for_each(measure::decided);
        Ok(())
    }
}

/// The text of an error that is the effect's own fault. Any other error, wherever it stands in the chain of causes, is
/// passed on: the batch is repeated, and no saga is blamed.
fn if_its_own(error: LocalError) -> Result<String, BatchError> {
    let class = match &error {
        LocalError::Database(error) => classify(error),
        LocalError::Failed(error) => classify_chain(error.as_ref()).unwrap_or(ErrorClass::Own),
    };
    match error {
        error if class == ErrorClass::Own => Ok(match error {
            LocalError::Database(error) => error.to_string(),
            LocalError::Failed(error) => chain(&error),
        }),
        LocalError::Database(error) => Err(BatchError::Database(error)),
        LocalError::Failed(error) => Err(BatchError::Effect(error)),
    }
}
