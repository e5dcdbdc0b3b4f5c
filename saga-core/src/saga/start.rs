//! Starting sagas: in the caller's transaction, or together with the other starts of that moment.
//!
//! ```text
//!   start_in ──────────────> [caller's writes | saga, event, due | local effects | outbox] caller's commit
//!   start ─> those that wait ─> [saga, event, due | outbox] one commit for all of them
//! ```
//!
//! A process that dies before the commit has started nothing. A process that dies after it has started the saga, even
//! if no caller got the answer. A caller that repeats the start with the same business key gets [`StartError::Exists`].

use super::{
    decide::{decide, start},
    definition::{Definition, Saga},
    engine::{Engine, version_of},
    error::StartError,
    loaded_saga,
    local::LocalCall,
    log::{LogEntry, LogEvent},
    measure,
    starts::WaitingStart,
    state::{Action, Effects, Event, Naming, State},
    store::{self, NewSaga},
};
use crate::{
    clock,
    command::Op,
    fail_point::fail_point,
    id::{Nonce, SagaId},
    json,
    outbox::{self, NewMessage, Tx},
    transaction::connection,
};
use serde::Serialize;
use serde_json::Value;
use std::{collections::HashSet, sync::Arc};
use tokio::sync::oneshot;

impl Engine {
    /// Starts a saga in the caller's transaction: its row, its log, its first command, all or nothing. If the caller
    /// commits with [`outbox::commit`], the relay reads the outbox at once.
    ///
    /// # Errors
    /// [`StartError::Exists`] leaves the transaction usable; after any other error it has to be rolled back.
    pub async fn start_in<I: Serialize>(
        &self,
        tx: &mut Tx<'_>,
        id: SagaId,
        saga: &Saga<I>,
        input: &I,
        business_key: &str,
    ) -> Result<(), StartError> {
        if !clock::process().is_known() {
            clock::hear(&mut **tx).await?;
        }
        let new = self.prepare(id, saga, input, business_key)?;
        match self.insert_in(tx, &[&new], &[]).await?.is_empty() {
            true => Err(StartError::Exists),
            false => self.run_first_in(tx, &new).await,
        }
    }

    /// Starts a saga for a caller that writes nothing else with it. Returns when its transaction is committed. Starts
    /// that come while one is under way share the next one's transaction. Where many come together, the first waits a
    /// millisecond or two for the others. No start waits because another's business key is locked. A caller that stops
    /// waiting stops nothing.
    ///
    /// # Errors
    /// As [`Engine::start_in`]. After [`StartError::Database`] the saga may have been started all the same, if the
    /// connection was lost during the commit, or the database fell silent: repeat it with the same business key.
    pub async fn start<I: Serialize>(
        self: &Arc<Self>,
        id: SagaId,
        saga: &Saga<I>,
        input: &I,
        business_key: &str,
    ) -> Result<(), StartError> {
        if !clock::process().is_known() {
            self.within(async { clock::hear(&mut *connection(self.pool()).await?).await }).await?;
        }
        let new = self.prepare(id, saga, input, business_key)?;
        let engine = Arc::clone(self);
        let (tell, answer) = oneshot::channel();
        // The start runs in a task that is not the caller's: the caller may go away, and the others' sagas must not go
        // with it.
        if new.fits_a_set() {
            self.starts().push(WaitingStart { engine, new, tell });
        } else {
            tokio::spawn(async move {
                // The caller may have gone.
                tell.send(engine.within(engine.start_one(&new)).await).ok();
            });
        }
        answer.await.unwrap_or(Err(StartError::Database(sqlx::Error::WorkerCrashed)))
    }

    async fn start_one(&self, new: &New) -> Result<(), StartError> {
        let mut tx = self.begin().await?;
        if self.insert_in(&mut tx, &[new], &[]).await?.is_empty() {
            return Err(StartError::Exists);
        }
        self.run_first_in(&mut tx, new).await?;
        fail_point!("saga.before-start", self.reply_topic());
        Ok(tx.commit_within_its_edges().await?)
    }

    fn prepare<I: Serialize>(
        &self,
        id: SagaId,
        saga: &Saga<I>,
        input: &I,
        business_key: &str,
    ) -> Result<New, StartError> {
        let definition = self.same(saga)?;
        let input = serde_json::to_value(input).map_err(|error| StartError::Input(error.to_string()))?;
        if business_key.contains('\0') {
            return Err(StartError::Input("the business key contains NUL".into()));
        }
        if let Some(flaw) = json::flaw(&input) {
            return Err(StartError::Input(flaw));
        }
        New::begin(Arc::clone(definition), id, input, business_key.to_owned(), self.reply_topic())
    }

    /// Inserts sagas and returns the ids of those that are new. Of `commands` only theirs are sent.
    pub(super) async fn insert_in(
        &self,
        tx: &mut Tx<'_>,
        set: &[&New],
        commands: &[NewMessage],
    ) -> Result<HashSet<SagaId>, StartError> {
        let rows: Vec<NewSaga<'_>> = set.iter().map(|new| new.row()).collect();
        Ok(store::insert_in(tx, &rows, commands, clock::now()).await?.into_iter().collect())
    }

    /// Does what follows a new saga's row: its local effects and its first command.
    async fn run_first_in(&self, tx: &mut Tx<'_>, new: &New) -> Result<(), StartError> {
        for step in &new.locals {
            let name = &new.definition.steps()[*step].name;
            let call = LocalCall { saga: new.state.saga, name, input: &new.input, failure: None };
            self.local(call.name)?.run(tx, &call).await?;
        }
        match &new.message {
            Some(message) => {
                let sent = outbox::append_in(tx, std::slice::from_ref(message)).await;
                sent.map_err(|error| StartError::Database(error.into()))?;
            }
            // An effect may have swallowed an error of the database. PostgreSQL would answer the commit with a
            // rollback, which sqlx calls a success. Any statement fails instead.
            None => {
                sqlx::query("select 1").execute(&mut **tx).await?;
            }
        }
        if new.state.is_finished() {
            measure::finished(new.definition.name(), new.state.status.as_str());
        }
        Ok(())
    }
}

/// A saga as it stands once its first command is issued, if the local effects before that succeed. They run after its
/// row is there; if one fails, there is no saga.
pub(super) struct New {
    definition: Arc<Definition>,
    business_key: String,
    input: Value,
    state: State,
    locals: Vec<usize>,
    message: Option<NewMessage>,
    entry: LogEntry,
}

impl New {
    fn begin(
        definition: Arc<Definition>,
        id: SagaId,
        input: Value,
        business_key: String,
        reply_topic: &str,
    ) -> Result<Self, StartError> {
        let now = clock::now();
        let naming = Naming { orchestrator: reply_topic.to_owned(), nonce: Nonce::new() };
        let (mut state, mut effects) = start(&definition, id, naming, now);
        let (mut locals, mut timeline) = (Vec::new(), Vec::new());
        let message = loop {
            let Effects { actions, timeline: more, .. } = effects;
            timeline.extend(more);
            match actions.first() {
                Some(Action::RunLocal { step, op: Op::Do }) => locals.push(*step),
                Some(Action::Send(send)) => {
                    let message = loaded_saga::message(&definition, &state, &input, send, reply_topic);
                    break Some(message.map_err(StartError::Input)?);
                }
                Some(Action::RunLocal { op: Op::Undo, .. }) | None => break None,
            }
            (state, effects) = decide(&definition, &state, &Event::LocalDone, now);
        };
        let entry = LogEntry { what: LogEvent::Started, then: timeline };
        Ok(Self { definition, business_key, input, state, locals, message, entry })
    }

    pub(super) fn saga(&self) -> SagaId {
        self.state.saga
    }

    pub(super) fn message(&self) -> Option<&NewMessage> {
        self.message.as_ref()
    }

    /// Whether the start is rows and nothing else: a local effect that fails must not take other sagas with it.
    fn fits_a_set(&self) -> bool {
        self.locals.is_empty() && !self.state.is_finished()
    }

    fn row(&self) -> NewSaga<'_> {
        NewSaga {
            definition: self.definition.name(),
            version: version_of(&self.definition),
            fingerprint: self.definition.fingerprint_of_format(self.state.format),
            business_key: &self.business_key,
            state: &self.state,
            input: &self.input,
            entry: &self.entry,
        }
    }
}
