//! The SQL of fences. Locks are taken in one order: fences, sorted; then intents; then the service's rows.
//!
//! Fences that are taken for new are made last. That waits for another transaction only where commands of one saga are
//! in two partitions, because the topic was given more. If it becomes a deadlock, PostgreSQL ends it, and the batch
//! comes again.

use super::fence::{DoState, Fence, FenceCommands, FenceKey, Namespace, Stored, UndoState};
use crate::{
    consumer::HandleError,
    id::{CommandId, SagaId},
    outbox::{self, AppendError, NewMessage, Statement, Tx},
};
use sqlx::{Row, postgres::PgRow};
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
};
use uuid::Uuid;

/// How often the participant looks for fences that another transaction makes meanwhile: once more than can be needed.
const LOOKS_MAX: usize = 3;

/// Fences that are parameters 7 to 17, as rows `c`. The ids are a subquery: given an array, PostgreSQL would see how
/// short it is and plan anew for each batch. That takes as long as the statement (measured).
macro_rules! fences {
    () => {
        "unnest((select $7::uuid[]), $8::text[], $9::int4[], $10::text[], $11::text[],
                $12::text[], $13::uuid[], $14::bytea[], $15::text[], $16::uuid[], $17::bytea[])
             as c (saga_id, step, occurrence, orchestrator, definition,
                   run_state, run_command, run_reply, undo_state, undo_command, undo_reply)"
    };
}

/// The step in the row of a fence `$k` that is apart; [`FenceKey::row_step`] spells it the same.
macro_rules! step_apart {
    ($k:literal) => {
        concat!($k, ".step || ' [' || ", $k, ".definition || ' of ' || ", $k, ".orchestrator || ']'")
    };
}

/// A condition: fence `$k` has no row that is apart.
macro_rules! is_not_apart {
    ($k:literal) => {
        concat!(
            "not exists (select from participant_fence p
                          where p.saga_id = ",
            $k,
            ".saga_id and p.occurrence = ",
            $k,
            ".occurrence
                            and p.step = ",
            step_apart!($k),
            ")"
        )
    };
}

/// Keys that are parameters 1 to 5, as rows `k`.
macro_rules! keys {
    () => {
        "unnest($1::uuid[], $2::text[], $3::int4[], $4::text[], $5::text[])
             as k (saga_id, step, occurrence, orchestrator, definition)"
    };
}

/// The fences of a batch, as their rows say.
pub(super) struct LockedFences {
    pub(super) fences: HashMap<FenceKey, Fence>,
    /// Fences in a state that this build does not know, and what their rows say. Nothing may be decided by them, and
    /// nothing written over them.
    pub(super) unreadable: HashMap<FenceKey, UnreadableFence>,
}

/// A fence in a state that this build does not know.
#[derive(Debug, thiserror::Error)]
#[error(
    "the record of step {step:?} is in state {state:?}, which this build does not know: a later build wrote it. Run that \
     build again, and roll back only when the sagas that it worked on have ended"
)]
pub(super) struct UnreadableFence {
    step: String,
    state: String,
}

impl LockedFences {
    /// The fences, if this build can read all of them.
    pub(super) fn all(self) -> Result<HashMap<FenceKey, Fence>, HandleError> {
        match self.unreadable.into_values().next() {
            Some(unreadable) => Err(HandleError::Failed(unreadable.into())),
            None => Ok(self.fences),
        }
    }

    fn knows(&self, key: &FenceKey) -> bool {
        self.fences.contains_key(key) || self.unreadable.contains_key(key)
    }

    /// Takes the fence of a row, or the state that this build does not know. A later row of the same fence is the better one.
    fn take(&mut self, key: FenceKey, fence: Result<Fence, String>) {
        match fence {
            Ok(fence) => {
                self.unreadable.remove(&key);
                self.fences.insert(key, fence);
            }
            Err(state) => {
                self.fences.remove(&key);
                self.unreadable.insert(key.clone(), UnreadableFence { step: key.step, state });
            }
        }
    }
}

/// Makes the fences that are not there, and locks all of them in sorted order.
///
/// The query looks for a fence in both of its places at once: the plain one, where builds look that know no namespaces,
/// and apart. Its row is the one of its namespace, or one that such a build wrote, if the known commands are the same.
pub(super) async fn lock_fences_in(
    tx: &mut Tx<'_>,
    keys: &BTreeMap<&FenceKey, FenceCommands>,
) -> Result<LockedFences, sqlx::Error> {
    let made = sqlx::query(concat!(
        "insert into participant_fence (saga_id, step, occurrence, orchestrator, definition)
         select *
           from ",
        keys!(),
        "
          where ",
        is_not_apart!("k"),
        "
          order by k.saga_id, k.step, k.occurrence
             on conflict do nothing"
    ));
    let made = bind_keys(made, keys.keys().copied()).execute(&mut **tx).await?;
    // Nearly always each command comes for the first time. A row that this transaction made is its own, and as it was
    // made.
    if made.rows_affected() == keys.len() as u64 {
        let fences = keys.keys().map(|&key| (key.clone(), Fence::new())).collect();
        return Ok(LockedFences { fences, unreadable: HashMap::new() });
    }
    for _ in 0..LOOKS_MAX {
        let Found { mut locked, elsewhere } = lock_in(tx, keys).await?;
        let missing: Vec<&FenceKey> = keys.keys().copied().filter(|key| !locked.knows(key)).collect();
        // Fewer rows were made: commands of one saga are in two partitions, and the other has made them meanwhile.
        if make_apart_in(tx, &missing).await? == missing.len() {
            let apart = |key| Fence { stored: Stored::Apart, elsewhere: elsewhere.contains(key), ..Fence::new() };
            locked.fences.extend(missing.into_iter().map(|key| (key.clone(), apart(key))));
            return Ok(locked);
        }
    }
    Err(sqlx::Error::Io(io::Error::new(
        io::ErrorKind::Interrupted,
        "another partition makes and removes the same fences",
    )))
}

/// Fences that were found, and the keys that another topic for replies has a record of.
struct Found {
    locked: LockedFences,
    elsewhere: HashSet<FenceKey>,
}

/// Locks the rows of `keys`, and finds out which of them are their fences.
async fn lock_in(tx: &mut Tx<'_>, keys: &BTreeMap<&FenceKey, FenceCommands>) -> Result<Found, sqlx::Error> {
    // The query locks row by row, in the order of the keys, and not one join. PostgreSQL 18 leaves rows out of a locked
    // join's answer when others changed them while it waited for them. It returns only the first of them (a nested
    // loop's rechecks). A fence that is not seen would pass for one where nothing was done.
    let locked = sqlx::query(concat!(
        "select k.saga_id, k.step, k.occurrence, k.orchestrator, k.definition,
                f.step <> k.step as is_apart, f.orchestrator = '' and f.definition = '' as is_nobodys,
                f.orchestrator = k.orchestrator and f.definition = k.definition as is_its_own,
                f.orchestrator not in ('', k.orchestrator) and f.definition = k.definition
                    and f.run_state <> 'absent' as is_elsewheres,
                f.run_state, f.run_command, f.run_reply, f.undo_state, f.undo_command, f.undo_reply
           from ",
        keys!(),
        "
          cross join lateral (
                select p.step, p.orchestrator, p.definition,
                       p.run_state, p.run_command, p.run_reply, p.undo_state, p.undo_command, p.undo_reply
                  from participant_fence p
                 where p.saga_id = k.saga_id and p.occurrence = k.occurrence
                   and p.step in (k.step, ",
        step_apart!("k"),
        ")
                 order by p.step
                   for update) f"
    ));
    let rows = bind_keys(locked, keys.keys().copied()).fetch_all(&mut **tx).await?;
    their_own(&rows, keys)
}

/// The fences of `keys`, among the rows that were locked for them. Each key has a row, in the plain place or apart.
fn their_own(rows: &[PgRow], keys: &BTreeMap<&FenceKey, FenceCommands>) -> Result<Found, sqlx::Error> {
    let mut locked = LockedFences { fences: HashMap::with_capacity(keys.len()), unreadable: HashMap::new() };
    let mut seen = HashSet::with_capacity(keys.len());
    let mut elsewhere = HashSet::new();
    for row in rows {
        let (key, fence) = (key(row)?, without_states(row)?);
        let known = keys.get(&key).copied().unwrap_or_default();
        seen.insert(key.clone());
        if known.nameless && row.try_get("is_elsewheres")? {
            elsewhere.insert(key.clone());
        }
        let taken = row.try_get("is_nobodys")? && fence.is_of(known) && !locked.knows(&key);
        if taken || row.try_get("is_its_own")? {
            locked.take(key, states(row)?.map(|(run, undo)| Fence { run, undo, ..fence }));
        }
    }
    if seen.len() != keys.len() {
        let (wanted, locked) = (keys.len(), seen.len());
        return Err(sqlx::Error::InvalidArgument(format!("{locked} of {wanted} fences were locked")));
    }
    for key in &elsewhere {
        if let Some(fence) = locked.fences.get_mut(key) {
            fence.elsewhere = true;
        }
    }
    Ok(Found { locked, elsewhere })
}

/// Makes the rows of fences whose plain place is another namespace's, which the caller has locked. Returns how many
/// rows it made.
async fn make_apart_in(tx: &mut Tx<'_>, keys: &[&FenceKey]) -> Result<usize, sqlx::Error> {
    if keys.is_empty() {
        return Ok(0);
    }
    let made = sqlx::query(concat!(
        "insert into participant_fence (saga_id, step, occurrence, orchestrator, definition)
         select k.saga_id, ",
        step_apart!("k"),
        ", k.occurrence, k.orchestrator, k.definition
           from ",
        keys!(),
        "
          order by k.saga_id, k.step, k.occurrence
             on conflict do nothing"
    ));
    let made = bind_keys(made, keys.iter().copied()).execute(&mut **tx).await?;
    Ok(usize::try_from(made.rows_affected()).unwrap_or(usize::MAX))
}

fn bind_keys<'q>(statement: Statement<'q>, keys: impl Iterator<Item = &'q FenceKey> + Clone) -> Statement<'q> {
    statement
        .bind(keys.clone().map(|key| key.saga.0).collect::<Vec<_>>())
        .bind(keys.clone().map(|key| key.step.as_str()).collect::<Vec<_>>())
        .bind(keys.clone().map(|key| key.occurrence).collect::<Vec<_>>())
        .bind(keys.clone().map(|key| key.namespace.orchestrator.as_str()).collect::<Vec<_>>())
        .bind(keys.map(|key| key.namespace.definition.as_str()).collect::<Vec<_>>())
}

/// Makes fences as they are after their first command, and appends the replies, in one statement. Returns false when
/// one of them was there already; then the caller has to roll back what was appended.
pub(super) async fn make_fences_in(
    tx: &mut Tx<'_>,
    fences: &HashMap<FenceKey, Fence>,
    replies: &[NewMessage],
) -> Result<bool, AppendError> {
    let statement = sqlx::query(concat!(
        "with made as (
             insert into participant_fence (saga_id, step, occurrence, orchestrator, definition,
                                            run_state, run_command, run_reply, undo_state, undo_command, undo_reply)
             select *
               from ",
        fences!(),
        "
              where ",
        is_not_apart!("c"),
        "
              order by c.saga_id, c.step, c.occurrence
                 on conflict do nothing
             returning 1
         ), sent as (",
        outbox::insert_messages!(),
        ")
         select count(*) from made"
    ));
    let made: i64 =
        bind_fences(outbox::bind_messages(statement, replies)?, fences).fetch_one(&mut **tx).await?.try_get(0)?;
    Ok(usize::try_from(made).is_ok_and(|made| made == fences.len()))
}

/// Writes the fences that changed, and the replies, in one statement: a batch's fixed price is its round trips.
pub(super) async fn write_fences_in(
    tx: &mut Tx<'_>,
    fences: &HashMap<FenceKey, Fence>,
    replies: &[NewMessage],
) -> Result<(), AppendError> {
    if fences.is_empty() {
        return outbox::append_in(tx, replies).await;
    }
    let statement = sqlx::query(concat!(
        "with fenced as (
             update participant_fence f
                set orchestrator = c.orchestrator, definition = c.definition,
                    run_state  = c.run_state,  run_command  = c.run_command,  run_reply  = c.run_reply,
                    undo_state = c.undo_state, undo_command = c.undo_command, undo_reply = c.undo_reply
               from ",
        fences!(),
        "
              where f.saga_id = c.saga_id and f.step = c.step and f.occurrence = c.occurrence
         ) ",
        outbox::insert_messages!()
    ));
    bind_fences(outbox::bind_messages(statement, replies)?, fences).execute(&mut **tx).await?;
    Ok(())
}

/// Binds the parameters of `fences!`, behind those of messages.
fn bind_fences<'q>(statement: Statement<'q>, fences: &'q HashMap<FenceKey, Fence>) -> Statement<'q> {
    let (keys, fence) = (|| fences.keys(), || fences.values());
    statement
        .bind(keys().map(|key| key.saga.0).collect::<Vec<_>>())
        .bind(fences.iter().map(|(key, fence)| key.row_step(fence.stored)).collect::<Vec<_>>())
        .bind(keys().map(|key| key.occurrence).collect::<Vec<_>>())
        .bind(keys().map(|key| key.namespace.orchestrator.as_str()).collect::<Vec<_>>())
        .bind(keys().map(|key| key.namespace.definition.as_str()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run.as_str()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run_command.map(|id| id.0)).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run.reply()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo.as_str()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo_command.map(|id| id.0)).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo.reply()).collect::<Vec<_>>())
}

fn key(row: &PgRow) -> Result<FenceKey, sqlx::Error> {
    Ok(FenceKey {
        saga: SagaId(row.try_get("saga_id")?),
        step: row.try_get("step")?,
        occurrence: row.try_get("occurrence")?,
        namespace: Namespace { orchestrator: row.try_get("orchestrator")?, definition: row.try_get("definition")? },
    })
}

/// The fence of a row, without the states of its commands.
fn without_states(row: &PgRow) -> Result<Fence, sqlx::Error> {
    Ok(Fence {
        stored: if row.try_get("is_apart")? { Stored::Apart } else { Stored::Plain },
        run_command: row.try_get::<Option<Uuid>, _>("run_command")?.map(CommandId),
        undo_command: row.try_get::<Option<Uuid>, _>("undo_command")?.map(CommandId),
        ..Fence::new()
    })
}

/// The states of a row's commands, or the text of one that this build does not know.
fn states(row: &PgRow) -> Result<Result<(DoState, UndoState), String>, sqlx::Error> {
    let run_reply: Option<Vec<u8>> = row.try_get("run_reply")?;
    let undo_reply: Option<Vec<u8>> = row.try_get("undo_reply")?;
    let run = match (row.try_get("run_state")?, run_reply) {
        ("absent", _) => DoState::Absent,
        ("open", _) => DoState::Open,
        ("calling", _) => DoState::Calling,
        ("in_doubt", _) => DoState::InDoubt,
        ("refused", _) => DoState::Refused,
        ("succeeded", Some(reply)) => DoState::Succeeded(reply),
        ("rejected", Some(reply)) => DoState::Rejected(reply),
        (other, _) => return Ok(Err(other.to_owned())),
    };
    let undo = match (row.try_get("undo_state")?, undo_reply) {
        ("absent", _) => UndoState::Absent,
        ("open", _) => UndoState::Open,
        ("waiting", _) => UndoState::Waiting,
        ("calling", _) => UndoState::Calling,
        ("in_doubt", _) => UndoState::InDoubt,
        ("done", Some(reply)) => UndoState::Done(reply),
        (other, _) => return Ok(Err(format!("{other} (of its undo)"))),
    };
    Ok(Ok((run, undo)))
}

impl DoState {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Open => "open",
            Self::Calling => "calling",
            Self::InDoubt => "in_doubt",
            Self::Succeeded(_) => "succeeded",
            Self::Rejected(_) => "rejected",
            Self::Refused => "refused",
        }
    }

    fn reply(&self) -> Option<&[u8]> {
        match self {
            Self::Succeeded(reply) | Self::Rejected(reply) => Some(reply),
            Self::Absent | Self::Open | Self::Calling | Self::InDoubt | Self::Refused => None,
        }
    }
}

impl UndoState {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Open => "open",
            Self::Waiting => "waiting",
            Self::Calling => "calling",
            Self::InDoubt => "in_doubt",
            Self::Done(_) => "done",
        }
    }

    fn reply(&self) -> Option<&[u8]> {
        match self {
            Self::Done(reply) => Some(reply),
            Self::Absent | Self::Open | Self::Waiting | Self::Calling | Self::InDoubt => None,
        }
    }
}
