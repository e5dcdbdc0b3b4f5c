//! The SQL of fences. Locks are taken in one order: fences, sorted; then intents; then the service's rows.
//!
//! Fences that are taken for new are made last. That waits for somebody only where commands of one saga are in two
//! partitions (the topic was given more); should it be a deadlock, PostgreSQL ends it, and the batch comes again.

use super::fence::{DoState, Fence, FenceKey, UndoState};
use crate::{
    id::{CommandId, SagaId},
    outbox::{self, AppendError, NewMessage, Statement, Tx},
};
use sqlx::{Row, postgres::PgRow};
use std::collections::{BTreeSet, HashMap};
use uuid::Uuid;

/// Fences that are parameters 7 to 15, as rows `c`. The keys as a subquery: of an array PostgreSQL would see how short it
/// is, and plan anew for each batch, which takes as long as the statement (measured).
macro_rules! fences {
    () => {
        "unnest((select $7::uuid[]), $8::text[], $9::int4[],
                $10::text[], $11::uuid[], $12::bytea[], $13::text[], $14::uuid[], $15::bytea[])
             as c (saga_id, step, occurrence, run_state, run_command, run_reply, undo_state, undo_command, undo_reply)"
    };
}

/// Makes the fences that are not there, and locks all of them in sorted order.
pub(super) async fn lock_fences(
    tx: &mut Tx<'_>,
    keys: &BTreeSet<&FenceKey>,
) -> Result<HashMap<FenceKey, Fence>, sqlx::Error> {
    let sagas: Vec<Uuid> = keys.iter().map(|key| key.saga.0).collect();
    let steps: Vec<&str> = keys.iter().map(|key| key.step.as_str()).collect();
    let occurrences: Vec<i32> = keys.iter().map(|key| key.occurrence).collect();
    let made = sqlx::query(
        "insert into participant_fence (saga_id, step, occurrence)
         select k.saga_id, k.step, k.occurrence
           from unnest($1::uuid[], $2::text[], $3::int4[]) as k (saga_id, step, occurrence)
          order by k.saga_id, k.step, k.occurrence
             on conflict do nothing",
    )
    .bind(&sagas)
    .bind(&steps)
    .bind(&occurrences)
    .execute(&mut **tx)
    .await?;
    // Nearly always: each command for the first time. What we made is ours, and as it was made.
    if made.rows_affected() == keys.len() as u64 {
        return Ok(keys.iter().map(|&key| (key.clone(), Fence::new())).collect());
    }
    // Row by row, in the order of the keys, and not as one join that is locked: PostgreSQL 18 leaves out of such a join's
    // answer all but the first of the rows that others changed while it waited for them (a nested loop's rechecks). A
    // fence that is not seen would pass for one where nothing was done.
    let rows = sqlx::query(
        "select f.*
           from unnest($1::uuid[], $2::text[], $3::int4[]) as k (saga_id, step, occurrence)
          cross join lateral (
                select saga_id, step, occurrence,
                       run_state, run_command, run_reply, undo_state, undo_command, undo_reply
                  from participant_fence
                 where saga_id = k.saga_id and step = k.step and occurrence = k.occurrence
                   for update) f",
    )
    .bind(&sagas)
    .bind(&steps)
    .bind(&occurrences)
    .fetch_all(&mut **tx)
    .await?;
    if rows.len() != keys.len() {
        let (wanted, locked) = (keys.len(), rows.len());
        return Err(sqlx::Error::InvalidArgument(format!("{locked} of {wanted} fences were locked")));
    }
    rows.iter().map(|row| Ok((key(row)?, fence(row)?))).collect()
}

/// Makes fences as they are after their first command, and appends the replies, in one statement; false when one of them
/// was there already: then what was appended is to be rolled back.
pub(super) async fn make_fences(
    tx: &mut Tx<'_>,
    fences: &HashMap<FenceKey, Fence>,
    replies: &[NewMessage],
) -> Result<bool, AppendError> {
    let statement = sqlx::query(concat!(
        "with made as (
             insert into participant_fence (saga_id, step, occurrence,
                                            run_state, run_command, run_reply, undo_state, undo_command, undo_reply)
             select *
               from ",
        fences!(),
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
pub(super) async fn write_fences(
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
                set run_state  = c.run_state,  run_command  = c.run_command,  run_reply  = c.run_reply,
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
        .bind(keys().map(|key| key.step.as_str()).collect::<Vec<_>>())
        .bind(keys().map(|key| key.occurrence).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run.as_str()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run_command.map(|id| id.0)).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.run.reply()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo.as_str()).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo_command.map(|id| id.0)).collect::<Vec<_>>())
        .bind(fence().map(|fence| fence.undo.reply()).collect::<Vec<_>>())
}

pub(super) fn key(row: &PgRow) -> Result<FenceKey, sqlx::Error> {
    Ok(FenceKey {
        saga: SagaId(row.try_get("saga_id")?),
        step: row.try_get("step")?,
        occurrence: row.try_get("occurrence")?,
    })
}

fn fence(row: &PgRow) -> Result<Fence, sqlx::Error> {
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
        (other, _) => return Err(sqlx::Error::Decode(format!("fence in state {other:?}").into())),
    };
    let undo = match (row.try_get("undo_state")?, undo_reply) {
        ("absent", _) => UndoState::Absent,
        ("open", _) => UndoState::Open,
        ("waiting", _) => UndoState::Waiting,
        ("calling", _) => UndoState::Calling,
        ("in_doubt", _) => UndoState::InDoubt,
        ("done", Some(reply)) => UndoState::Done(reply),
        (other, _) => return Err(sqlx::Error::Decode(format!("fence with undo in state {other:?}").into())),
    };
    Ok(Fence {
        run,
        run_command: row.try_get::<Option<Uuid>, _>("run_command")?.map(CommandId),
        undo,
        undo_command: row.try_get::<Option<Uuid>, _>("undo_command")?.map(CommandId),
    })
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
