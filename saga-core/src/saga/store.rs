//! The engine's SQL: sagas loaded and written in sets, a handful of statements whatever their number.
//!
//! Locks are taken in the order of the saga ids. The transaction with a saga's row lock decides. The update checks the
//! revision all the same, because a lost update here would be a lost undo.

use super::{
    due,
    log::LogEntry,
    state::{FORMAT, State},
};
use crate::{
    clock,
    command::{Op, Outcome},
    id::{CommandId, MessageId, SagaId},
    outbox::{self, NewMessage, Tx},
};
use serde_json::Value;
use sqlx::{Row as _, postgres::PgRow, types::Json};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};
use time::OffsetDateTime;
use uuid::Uuid;

/// A saga's row, locked. It reads only what every build writes in the same way. The state is for builds that have the
/// saga's definition and know its format.
pub(super) struct Locked {
    pub(super) saga: SagaId,
    pub(super) definition: String,
    pub(super) version: i32,
    pub(super) fingerprint: String,
    pub(super) revision: i32,
    /// The database's clock when it was locked.
    pub(super) now: OffsetDateTime,
    row: PgRow,
}

/// A saga's row, locked and read.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) definition: String,
    pub(super) version: i32,
    pub(super) revision: i32,
    pub(super) state: State,
    pub(super) armed_at: Option<OffsetDateTime>,
    pub(super) input: Value,
    /// The database's clock when the row was locked; decisions about it go by that time.
    pub(super) now: OffsetDateTime,
}

/// A new saga, with what its row and its log begin with.
#[derive(Debug)]
pub(super) struct NewSaga<'a> {
    pub(super) definition: &'a str,
    pub(super) version: i32,
    pub(super) fingerprint: String,
    pub(super) business_key: &'a str,
    pub(super) state: &'a State,
    pub(super) input: &'a Value,
    pub(super) entry: &'a LogEntry,
}

/// What a saga's row becomes.
#[derive(Debug)]
pub(super) struct SagaUpdate<'a> {
    pub(super) definition: &'a str,
    pub(super) version: i32,
    pub(super) from_revision: i32,
    pub(super) to_revision: i32,
    pub(super) state: &'a State,
    pub(super) due: Due,
    pub(super) armed_at: Option<OffsetDateTime>,
}

/// What becomes of a saga's row in `saga_due`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// The row's time is early enough.
    Keep,
    /// The row needs another time or status.
    Set,
    /// The saga has ended, and its row goes.
    Remove,
}

/// A row of the log.
#[derive(Debug)]
pub(super) struct Event<'a> {
    pub(super) saga: SagaId,
    pub(super) revision: i32,
    pub(super) entry: &'a LogEntry,
}

/// A reply that this replica cannot decide.
#[derive(Debug, Clone)]
pub(super) struct Undecided {
    pub(super) message: MessageId,
    /// The message's type; `None`: an older build set it aside.
    pub(super) kind: Option<String>,
    pub(super) saga: SagaId,
    pub(super) definition: String,
    pub(super) version: i32,
    pub(super) fingerprint: String,
    pub(super) step: String,
    pub(super) op: Op,
    pub(super) command: CommandId,
    pub(super) attempt: i32,
    pub(super) outcome: Outcome,
    pub(super) payload: Option<Vec<u8>>,
    /// How long the reply is left alone; above zero where a replica with the definition could not read the saga.
    pub(super) put_off: Duration,
}

/// The definitions that a replica knows, in each format that it can read, as columns.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) definitions: Vec<String>,
    pub(super) versions: Vec<i32>,
    pub(super) fingerprints: Vec<String>,
}

/// Inserts sagas that do not exist yet, with the first line of their logs, their due times and their commands; returns
/// those that were new. A command's key is its saga's id.
pub(super) async fn insert_in(
    tx: &mut Tx<'_>,
    sagas: &[NewSaga<'_>],
    commands: &[NewMessage],
    now: OffsetDateTime,
) -> sqlx::Result<Vec<SagaId>> {
    let column = |of: fn(&NewSaga<'_>) -> String| sagas.iter().map(of).collect::<Vec<String>>();
    let statement = sqlx::query(concat!(
        "with started as (
             insert into saga (saga_id, definition, version, fingerprint, business_key, status, revision, state, armed_at,
                               input, created_at, updated_at, finished_at)
             select n.saga_id, n.definition, n.version, n.fingerprint, n.business_key, n.status, 1, n.state, n.due_at,
                    n.input, $17, $17, case when n.status = 'completed' then $17 end
               from unnest($7::uuid[], $8::text[], $9::int[], $10::text[], $11::text[], $12::text[], $13::jsonb[],
                           $14::timestamptz[], $15::jsonb[])
                      as n(saga_id, definition, version, fingerprint, business_key, status, state, due_at, input)
              order by n.saga_id
                 on conflict do nothing
             returning saga_id, definition, version, status, armed_at
         ), due as (
             insert into saga_due (saga_id, definition, version, status, due_at, key_hash)
             select saga_id, definition, version, status, armed_at, h.key_hash
               from started
               join unnest($7::uuid[], $18::int[]) as h(saga_id, key_hash) using (saga_id)
              where status <> 'completed'
         ), told as (
             insert into saga_event (saga_id, revision, at, kind, entry)
             select e.saga_id, 1, $17, 'started', e.entry
               from unnest($7::uuid[], $16::jsonb[]) as e(saga_id, entry)
               join started using (saga_id)
         ), sent as (
             ",
        outbox::insert_messages!("where key in (select saga_id::text from started)"),
        ")
         select saga_id from started"
    ));
    outbox::bind_messages(statement, commands)?
        .bind(sagas.iter().map(|s| s.state.saga.0).collect::<Vec<Uuid>>())
        .bind(column(|s| s.definition.into()))
        .bind(sagas.iter().map(|s| s.version).collect::<Vec<i32>>())
        .bind(column(|s| s.fingerprint.clone()))
        .bind(column(|s| s.business_key.into()))
        .bind(column(|s| s.state.status.as_str().into()))
        .bind(sagas.iter().map(|s| Json(s.state)).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| s.state.due()).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| Json(s.input)).collect::<Vec<_>>())
        .bind(sagas.iter().map(|s| Json(s.entry)).collect::<Vec<_>>())
        .bind(now)
        .bind(sagas.iter().map(|s| due::key_hash_of(s.state.saga)).collect::<Vec<i32>>())
        .try_map(|found: PgRow| found.try_get(0).map(SagaId))
        .fetch_all(&mut **tx)
        .await
}

/// Locks and loads sagas, in the order of their ids. Ids without a saga are not in the answer.
pub(super) async fn load_in(tx: &mut Tx<'_>, ids: &[SagaId]) -> sqlx::Result<Vec<Locked>> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
    let asked = clock::monotonic();
    let rows = sqlx::query(
        "with locked as materialized (
             select saga_id, definition, version, fingerprint, revision, state, armed_at, input
               from saga
              where saga_id = any($1)
              order by saga_id
                for update
         )
         select locked.*, clock_timestamp() as now from locked",
    )
    .bind(ids)
    .try_map(Locked::new)
    .fetch_all(&mut **tx)
    .await?;
    Ok(heard(rows, asked))
}

/// Sets this process's clock by the database's time in the rows.
pub(super) fn heard(rows: Vec<Locked>, asked: Instant) -> Vec<Locked> {
    if let Some(locked) = rows.last() {
        clock::process().heard(locked.now, asked);
    }
    rows
}

impl Locked {
    pub(super) fn new(row: PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            saga: SagaId(row.try_get("saga_id")?),
            definition: row.try_get("definition")?,
            version: row.try_get("version")?,
            fingerprint: row.try_get("fingerprint")?,
            revision: row.try_get("revision")?,
            now: row.try_get("now")?,
            row,
        })
    }

    /// Reads the rest of the row, if this build can read it.
    pub(super) fn read(&self) -> sqlx::Result<Row> {
        let Json(input): Json<Value> = self.row.try_get("input")?;
        Ok(Row {
            definition: self.definition.clone(),
            version: self.version,
            revision: self.revision,
            state: state(&self.row)?,
            armed_at: self.row.try_get("armed_at")?,
            input,
            now: self.now,
        })
    }
}

/// The state in a row of `saga`, if this build can read it.
pub(super) fn state(row: &PgRow) -> sqlx::Result<State> {
    let Json(mut state): Json<State> = row.try_get("state")?;
    // The fingerprint names the format too, and brought the row here: one of the two was tampered with.
    if state.format > FORMAT || (state.format > 1) != state.naming.is_some() {
        return Err(sqlx::Error::Decode(format!("its state is of format {}", state.format).into()));
    }
    state.saga = SagaId(row.try_get("saga_id")?);
    Ok(state)
}

/// Writes sagas back, each under the revision that it was loaded with, appends `events` to their logs and `messages` to
/// the outbox. Sagas that ended leave `saga_due`. One statement: each costs a round trip while the locks are held.
pub(super) async fn update_in(
    tx: &mut Tx<'_>,
    changes: &[SagaUpdate<'_>],
    events: &[Event<'_>],
    messages: &[NewMessage],
    now: OffsetDateTime,
) -> sqlx::Result<()> {
    if changes.is_empty() && events.is_empty() {
        return Ok(outbox::append_in(tx, messages).await?);
    }
    let statement = sqlx::query(concat!(
        "with changed as (
             update saga s
                set status = n.status, revision = n.to_revision, state = n.state, armed_at = n.armed_at, updated_at = $13,
                    finished_at = case when n.status in ('completed', 'compensated') then coalesce(s.finished_at, $13) end
               from unnest($7::uuid[], $8::int[], $9::int[], $10::text[], $11::jsonb[], $12::timestamptz[])
                      as n(saga_id, from_revision, to_revision, status, state, armed_at)
              where s.saga_id = n.saga_id
                and s.revision = n.from_revision
             returning s.saga_id
         ), ended as (
             delete from saga_due where saga_id = any($14)
         ), told as (
             insert into saga_event (saga_id, revision, at, kind, entry)
             select saga_id, revision, $13, kind, entry
               from unnest($15::uuid[], $16::int[], $17::text[], $18::jsonb[]) as e(saga_id, revision, kind, entry)
         ), sent as (
             ",
        outbox::insert_messages!(),
        ")
         select count(*) from changed"
    ));
    let updated: i64 = outbox::bind_messages(statement, messages)?
        .bind(changes.iter().map(|c| c.state.saga.0).collect::<Vec<Uuid>>())
        .bind(changes.iter().map(|c| c.from_revision).collect::<Vec<i32>>())
        .bind(changes.iter().map(|c| c.to_revision).collect::<Vec<i32>>())
        .bind(changes.iter().map(|c| c.state.status.as_str()).collect::<Vec<&str>>())
        .bind(changes.iter().map(|c| Json(c.state)).collect::<Vec<_>>())
        .bind(changes.iter().map(|c| c.armed_at).collect::<Vec<_>>())
        .bind(now)
        .bind(changes.iter().filter(|c| c.due == Due::Remove).map(|c| c.state.saga.0).collect::<Vec<Uuid>>())
        .bind(events.iter().map(|e| e.saga.0).collect::<Vec<Uuid>>())
        .bind(events.iter().map(|e| e.revision).collect::<Vec<i32>>())
        .bind(events.iter().map(|e| e.entry.what.kind()).collect::<Vec<&str>>())
        .bind(events.iter().map(|e| Json(e.entry)).collect::<Vec<_>>())
        .fetch_one(&mut **tx)
        .await?
        .try_get(0)?;
    if usize::try_from(updated).ok() != Some(changes.len()) {
        let wanted = changes.len();
        return Err(sqlx::Error::InvalidArgument(format!("{updated} of {wanted} locked sagas were at their revision")));
    }
    due::rearm_in(tx, changes).await
}

/// The unexpected replies in the logs of `sagas`, one of each kind. A batch asks only when it has such a reply.
pub(super) async fn load_unexpected_replies_in(
    tx: &mut Tx<'_>,
    sagas: &[SagaId],
) -> sqlx::Result<HashMap<SagaId, Vec<LogEntry>>> {
    let found: Vec<(Uuid, Json<Value>)> = sqlx::query_as(
        "select distinct on (saga_id, entry ->> 'step', entry ->> 'op', entry ->> 'outcome', entry ->> 'why')
                saga_id, entry
           from saga_event
          where saga_id = any($1)
            and kind = 'ignored'",
    )
    .bind(sagas.iter().map(|saga| saga.0).collect::<Vec<Uuid>>())
    .fetch_all(&mut **tx)
    .await?;
    let mut by_saga: HashMap<SagaId, Vec<LogEntry>> = HashMap::new();
    for (saga, Json(entry)) in found {
        // A line that this build cannot read is of a kind that this build does not write.
        if let Ok(entry) = serde_json::from_value(entry) {
            by_saga.entry(SagaId(saga)).or_default().push(entry);
        }
    }
    Ok(by_saga)
}

/// Keeps replies for a replica that can decide them. `received_at` of one that is put off is when it may be tried
/// again.
pub(super) async fn set_aside_in(tx: &mut Tx<'_>, replies: &[Undecided]) -> sqlx::Result<()> {
    let text = |of: fn(&Undecided) -> String| replies.iter().map(of).collect::<Vec<String>>();
    sqlx::query(
        "insert into saga_undecided (message_id, saga_id, definition, version, fingerprint, step, op, command_id,
                                     attempt, outcome, payload, type, received_at)
         select r.message_id, r.saga_id, r.definition, r.version, r.fingerprint, r.step, r.op, r.command_id, r.attempt,
                r.outcome, r.payload, r.type, clock_timestamp() + make_interval(secs => r.put_off)
           from unnest($1::uuid[], $2::uuid[], $3::text[], $4::int[], $5::text[], $6::text[], $7::text[],
                       $8::uuid[], $9::int[], $10::text[], $11::bytea[], $12::float8[], $13::text[])
                  as r(message_id, saga_id, definition, version, fingerprint, step, op, command_id, attempt, outcome,
                       payload, put_off, type)
             on conflict do nothing",
    )
    .bind(replies.iter().map(|r| r.message.0).collect::<Vec<Uuid>>())
    .bind(replies.iter().map(|r| r.saga.0).collect::<Vec<Uuid>>())
    .bind(text(|r| r.definition.clone()))
    .bind(replies.iter().map(|r| r.version).collect::<Vec<i32>>())
    .bind(text(|r| r.fingerprint.clone()))
    .bind(text(|r| r.step.clone()))
    .bind(text(|r| r.op.to_string()))
    .bind(replies.iter().map(|r| r.command.0).collect::<Vec<Uuid>>())
    .bind(replies.iter().map(|r| r.attempt).collect::<Vec<i32>>())
    .bind(text(|r| r.outcome.to_string()))
    .bind(replies.iter().map(|r| r.payload.clone()).collect::<Vec<_>>())
    .bind(replies.iter().map(|r| r.put_off.as_secs_f64()).collect::<Vec<f64>>())
    .bind(replies.iter().map(|r| r.kind.clone()).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Takes replies that were set aside and that this replica can decide, in the order of their arrival. Replies with an
/// `op` or outcome that this build does not know stay where they are.
pub(super) async fn take_undecided_in(
    tx: &mut Tx<'_>,
    known: &Known,
    limit: i64,
    only: Option<MessageId>,
) -> sqlx::Result<Vec<Undecided>> {
    sqlx::query(
        "with taken as (
             select u.message_id
               from saga_undecided u
               join unnest($1::text[], $2::int[], $3::text[]) as k(definition, version, fingerprint)
                 on k.definition = u.definition and k.version = u.version and k.fingerprint = u.fingerprint
              where u.received_at <= statement_timestamp()
                and u.op = any($5) and u.outcome = any($6)
                and ($7::uuid is null or u.message_id = $7)
              order by u.received_at, u.message_id
              limit $4
                for update of u skip locked
         )
         delete from saga_undecided u
          using taken
          where u.message_id = taken.message_id
         returning u.message_id, u.saga_id, u.definition, u.version, u.fingerprint, u.step, u.op, u.command_id,
                   u.attempt, u.outcome, u.payload, u.type",
    )
    .bind(&known.definitions)
    .bind(&known.versions)
    .bind(&known.fingerprints)
    .bind(limit)
    .bind(Op::NAMES)
    .bind(Outcome::NAMES)
    .bind(only.map(|message| message.0))
    .try_map(|found: PgRow| undecided(&found))
    .fetch_all(&mut **tx)
    .await
}

/// Tries a reply that was set aside again after `wait`.
pub(super) async fn put_off_undecided_in(tx: &mut Tx<'_>, message: MessageId, wait: Duration) -> sqlx::Result<()> {
    sqlx::query(
        "update saga_undecided set received_at = clock_timestamp() + make_interval(secs => $2) where message_id = $1",
    )
    .bind(message.0)
    .bind(wait.as_secs_f64())
    .execute(&mut **tx)
    .await
    .map(drop)
}

fn undecided(row: &PgRow) -> sqlx::Result<Undecided> {
    let malformed =
        |column: &str| sqlx::Error::ColumnDecode { index: column.into(), source: "not a known word".into() };
    Ok(Undecided {
        message: MessageId(row.try_get("message_id")?),
        kind: row.try_get("type")?,
        saga: SagaId(row.try_get("saga_id")?),
        definition: row.try_get("definition")?,
        version: row.try_get("version")?,
        fingerprint: row.try_get("fingerprint")?,
        step: row.try_get("step")?,
        op: row.try_get::<&str, _>("op")?.parse().map_err(|()| malformed("op"))?,
        command: CommandId(row.try_get("command_id")?),
        attempt: row.try_get("attempt")?,
        outcome: row.try_get::<&str, _>("outcome")?.parse().map_err(|()| malformed("outcome"))?,
        payload: row.try_get("payload")?,
        put_off: Duration::ZERO,
    })
}
