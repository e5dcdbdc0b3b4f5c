//! The SQL of intents: a queue of effects that are to be performed, claimed with a lease.

use super::{
    entry::StoredIntent,
    fence::{FenceCommands, FenceKey, Namespace, Stored},
    handler::CommandContext,
};
use crate::{
    clock,
    command::{Happened, Op},
    envelope::{Envelope, Headers, SagaHeaders, header},
    id::{CommandId, MessageId, SagaId},
    outbox::Tx,
    reason::reason,
    trace,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Row, postgres::PgRow, types::Json};
use std::{collections::BTreeMap, time::Duration};
use time::OffsetDateTime;
use uuid::Uuid;

/// Where an intent's reply goes, and which message asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IntentOrigin {
    definition: String,
    version: u32,
    attempt: u32,
    reply_to: Option<String>,
    /// The orchestrator's name in the command's headers; an older build does not write it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    orchestrator: Option<String>,
    message: MessageId,
    undoes: Option<CommandId>,
    /// An older build does not write it: in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    happened: Option<Happened>,
    pub(super) trace: Headers,
}

impl IntentOrigin {
    pub(super) fn new(cx: &CommandContext, undoes: Option<CommandId>, trace: Headers) -> Self {
        Self {
            definition: cx.saga.definition.clone(),
            version: cx.saga.version,
            attempt: cx.saga.attempt,
            reply_to: cx.saga.reply_to.clone(),
            orchestrator: cx.saga.orchestrator.clone(),
            message: cx.message,
            undoes,
            happened: cx.saga.happened,
            trace,
        }
    }
}

/// The state in which an intent begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IntentState {
    /// An undo that waits until the call of its do is settled.
    Waiting,
    /// The effect is to be called.
    Open,
}

impl IntentState {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Open => "open",
        }
    }
}

pub(super) struct NewIntent {
    pub(super) command: CommandId,
    pub(super) key: FenceKey,
    pub(super) stored: Stored,
    pub(super) op: Op,
    pub(super) kind: &'static str,
    pub(super) state: IntentState,
    pub(super) origin: IntentOrigin,
    pub(super) payload: Vec<u8>,
    pub(super) prepared: Option<Value>,
}

/// An intent that is claimed by this process, until the claim's lease runs out.
pub(super) struct ClaimedIntent {
    /// The id of the claim; no two claims of one intent have the same.
    pub(super) owner: Uuid,
    pub(super) key: FenceKey,
    pub(super) kind: String,
    pub(super) intent: StoredIntent,
    pub(super) trace: Headers,
    /// Whether it is an undo that waited for a call and is to be handled now.
    pub(super) ready: bool,
    pub(super) attempts: u32,
}

/// Inserts intents and waiting undos.
pub(super) async fn insert_intents_in(tx: &mut Tx<'_>, intents: &[NewIntent]) -> Result<(), sqlx::Error> {
    if intents.is_empty() {
        return Ok(());
    }
    let all = || intents.iter();
    sqlx::query(
        "insert into participant_intent
                (command_id, saga_id, step, occurrence, op, type, state, origin, payload, prepared)
         select *
           from unnest($1::uuid[], $2::uuid[], $3::text[], $4::int4[], $5::text[], $6::text[], $7::text[],
                       $8::jsonb[], $9::bytea[], $10::jsonb[])",
    )
    .bind(all().map(|i| i.command.0).collect::<Vec<_>>())
    .bind(all().map(|i| i.key.saga.0).collect::<Vec<_>>())
    .bind(all().map(|i| i.key.row_step(i.stored)).collect::<Vec<_>>())
    .bind(all().map(|i| i.key.occurrence).collect::<Vec<_>>())
    .bind(all().map(|i| i.op.as_str()).collect::<Vec<_>>())
    .bind(all().map(|i| i.kind).collect::<Vec<_>>())
    .bind(all().map(|i| i.state.as_str()).collect::<Vec<_>>())
    .bind(all().map(|i| Json(&i.origin)).collect::<Vec<_>>())
    .bind(all().map(|i| i.payload.as_slice()).collect::<Vec<_>>())
    .bind(all().map(|i| i.prepared.clone()).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Opens intents again that were given up in doubt, with fresh attempts; the reply goes to the sender of the resend.
pub(super) async fn reopen_intents_in(
    tx: &mut Tx<'_>,
    intents: &[(CommandId, IntentOrigin)],
) -> Result<(), sqlx::Error> {
    if intents.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update participant_intent i
            set state = 'open', origin = c.origin, attempts = 0, due_at = clock_timestamp(), claimed_by = null
           from unnest($1::uuid[], $2::jsonb[]) as c (command_id, origin)
          where i.command_id = c.command_id and i.state = 'in_doubt'",
    )
    .bind(intents.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
    .bind(intents.iter().map(|(_, origin)| Json(origin)).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Removes intents that their undo has settled.
pub(super) async fn delete_intents_in(tx: &mut Tx<'_>, intents: &[CommandId]) -> Result<(), sqlx::Error> {
    if intents.is_empty() {
        return Ok(());
    }
    sqlx::query("delete from participant_intent where command_id = any($1)")
        .bind(intents.iter().map(|id| id.0).collect::<Vec<_>>())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Whether a failed attempt counts against the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttemptCount {
    Yes,
    /// The database was at fault, not the call; or no call was made.
    No,
}

/// How many calls there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClaimLimits {
    /// Room for all intents together.
    pub(super) all: usize,
    /// Room within `all` for intents that were called before.
    pub(super) again: usize,
}

/// Claims as many due intents of the given types as there is room for, for `lease`, and counts an attempt of each.
/// Intents that were never called come first. `owner` is a new id: a process that claims an intent again must not pass
/// for its former holder.
pub(super) async fn claim_in(
    tx: &mut Tx<'_>,
    kinds: &[&str],
    limits: ClaimLimits,
    owner: Uuid,
    lease: Duration,
) -> Result<Vec<ClaimedIntent>, sqlx::Error> {
    let rows = sqlx::query(
        "with fresh as (
             select command_id
               from participant_intent
              where state in ('ready', 'open') and attempts = 0 and due_at <= statement_timestamp() and type = any($1)
              order by due_at
              limit $2
                for update skip locked
         ), again as (
             select command_id
               from participant_intent
              where state in ('ready', 'open') and attempts > 0 and due_at <= statement_timestamp() and type = any($1)
              order by due_at
              limit least($5, $2 - (select count(*) from fresh))
                for update skip locked
         ), due as (
             select command_id from fresh union all select command_id from again
         )
         update participant_intent i
            set claimed_by = $3, due_at = clock_timestamp() + make_interval(secs => $4), attempts = i.attempts + 1
           from due
          where i.command_id = due.command_id
      returning i.command_id, i.saga_id, i.step, i.occurrence, i.op, i.type, i.state, i.origin, i.payload, i.prepared,
                i.attempts",
    )
    .bind(kinds)
    .bind(i64::try_from(limits.all).unwrap_or(i64::MAX))
    .bind(owner)
    .bind(clock::seconds(lease))
    .bind(i64::try_from(limits.again).unwrap_or(i64::MAX))
    .fetch_all(&mut **tx)
    .await?;
    let (mut claims, mut unreadable) = (Vec::with_capacity(rows.len()), Vec::new());
    for row in &rows {
        match claimed(row, owner) {
            Ok(claim) => claims.push(claim),
            Err(error) => unreadable.push((CommandId(row.try_get("command_id")?), error.to_string())),
        }
    }
    if !unreadable.is_empty() {
        put_off_in(tx, &unreadable).await?;
    }
    Ok(claims)
}

/// Ends the claims of intents that this build cannot read, and puts them off for a minute. Another build may claim them
/// meanwhile; the other intents of the set go on.
async fn put_off_in(tx: &mut Tx<'_>, intents: &[(CommandId, String)]) -> Result<(), sqlx::Error> {
    for (command, error) in intents {
        tracing::error!(%command, error, "this build cannot read an intent: it is put off for a minute, and its effect is not \
            performed meanwhile; another build wrote it, which can perform it, or its row is damaged");
        metrics::counter!("participant_intents_unreadable_total").increment(1);
    }
    sqlx::query(
        "update participant_intent i
            set claimed_by = null, due_at = clock_timestamp() + interval '1 minute', attempts = i.attempts - 1,
                last_error = u.error
           from unnest($1::uuid[], $2::text[]) as u (command_id, error)
          where i.command_id = u.command_id",
    )
    .bind(intents.iter().map(|(id, _)| id.0).collect::<Vec<_>>())
    .bind(intents.iter().map(|(_, error)| reason(error)).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await
    .map(drop)
}

/// The intents that a query covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IntentScope {
    All,
    /// Intents that were never called.
    Fresh,
}

/// How long until the next intent is due; `None` when there is none.
pub(super) async fn next_due_in(
    tx: &mut Tx<'_>,
    kinds: &[&str],
    which: IntentScope,
) -> Result<Option<Duration>, sqlx::Error> {
    let seconds: Option<f64> = sqlx::query_scalar(match which {
        IntentScope::All => {
            "select extract(epoch from min(due_at) - clock_timestamp())::float8
               from participant_intent
              where state in ('ready', 'open') and type = any($1)"
        }
        IntentScope::Fresh => {
            "select extract(epoch from min(due_at) - clock_timestamp())::float8
               from participant_intent
              where state in ('ready', 'open') and type = any($1) and attempts = 0"
        }
    })
    .bind(kinds)
    .fetch_one(&mut **tx)
    .await?;
    Ok(seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()))
}

/// Counts the intents in each state, with 0 for a state that has none.
pub(super) async fn count_in(tx: &mut Tx<'_>) -> Result<Vec<(String, i64)>, sqlx::Error> {
    sqlx::query_as(
        "select s.state, count(i.state)
           from unnest(array['waiting', 'ready', 'open', 'in_doubt']) as s (state)
           left join participant_intent i on i.state = s.state
          group by s.state",
    )
    .fetch_all(&mut **tx)
    .await
}

/// An intent's id, since when it waits, its last error, and how many intents wait.
pub(super) type Oldest = (Uuid, OffsetDateTime, Option<String>, i64);

/// The intent that waits for longest, among those to be performed and those in doubt that were tried lately.
pub(super) async fn oldest_in(tx: &mut Tx<'_>) -> Result<Option<Oldest>, sqlx::Error> {
    sqlx::query_as(
        "select command_id, created_at, last_error, count(*) over ()
           from participant_intent
          where state in ('ready', 'open')
             -- Its saga asks again; after two minutes it has given up, and is stuck.
             or state = 'in_doubt' and due_at > clock_timestamp() - interval '2 minutes'
          order by created_at, command_id
          limit 1",
    )
    .fetch_optional(&mut **tx)
    .await
}

/// Removes a claimed intent; false when the claim was lost.
pub(super) async fn close_intent_in(tx: &mut Tx<'_>, command: CommandId, owner: Uuid) -> Result<bool, sqlx::Error> {
    let done = sqlx::query("delete from participant_intent where command_id = $1 and claimed_by = $2")
        .bind(command.0)
        .bind(owner)
        .execute(&mut **tx)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Gives up a claimed intent, in doubt; false when the claim was lost.
pub(super) async fn doubt_intent_in(
    tx: &mut Tx<'_>,
    command: CommandId,
    owner: Uuid,
    reason: &str,
) -> Result<bool, sqlx::Error> {
    let done = sqlx::query(
        "update participant_intent
            set state = 'in_doubt', claimed_by = null, last_error = $3
          where command_id = $1 and claimed_by = $2",
    )
    .bind(command.0)
    .bind(owner)
    .bind(reason)
    .execute(&mut **tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Ends a claim; the intent is due again after `delay`.
pub(super) async fn release_in(
    tx: &mut Tx<'_>,
    claim: &ClaimedIntent,
    counted: AttemptCount,
    delay: Duration,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update participant_intent
            set claimed_by = null, due_at = clock_timestamp() + make_interval(secs => $3), last_error = $4,
                attempts = attempts - $5
          where command_id = $1 and claimed_by = $2",
    )
    .bind(claim.intent.cx.saga.command.0)
    .bind(claim.owner)
    .bind(clock::seconds(delay))
    .bind(reason)
    .bind(i32::from(counted == AttemptCount::No))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Readies an undo whose do's call is settled.
pub(super) async fn ready_undo_in(tx: &mut Tx<'_>, undo: CommandId) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update participant_intent
            set state = 'ready', due_at = clock_timestamp()
          where command_id = $1 and state = 'waiting'",
    )
    .bind(undo.0)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl ClaimedIntent {
    /// The intent's fence, to be locked.
    pub(super) fn fence(&self) -> BTreeMap<&FenceKey, FenceCommands> {
        BTreeMap::from([(&self.key, FenceCommands::of(&self.intent.cx))])
    }

    /// A span for work on the intent: it continues its command's trace, and its ids are on every line logged within.
    pub(super) fn span(&self) -> tracing::Span {
        let saga = &self.intent.cx.saga;
        let span = tracing::info_span!("intent", kind = self.kind, saga = %saga.saga,
            saga_type = saga.definition, saga_step = saga.step, command_id = %saga.command, correlation_id = self.trace.get(header::CORRELATION_ID));
        let mut envelope = Envelope::new(self.intent.cx.message, "", &self.kind);
        envelope.traceparent = self.trace.get(header::TRACEPARENT).cloned();
        envelope.tracestate = self.trace.get(header::TRACESTATE).cloned();
        trace::continue_from(&span, &envelope);
        span
    }
}

fn claimed(row: &PgRow, owner: Uuid) -> Result<ClaimedIntent, sqlx::Error> {
    let Json(origin): Json<IntentOrigin> = row.try_get("origin")?;
    let occurrence: i32 = row.try_get("occurrence")?;
    let mut saga = SagaHeaders {
        saga: SagaId(row.try_get("saga_id")?),
        definition: origin.definition,
        version: origin.version,
        step: row.try_get("step")?,
        op: row.try_get::<&str, _>("op")?.parse().map_err(|()| sqlx::Error::Decode("not a known op".into()))?,
        occurrence: occurrence.unsigned_abs(),
        command: CommandId(row.try_get("command_id")?),
        attempt: origin.attempt,
        undoes: origin.undoes,
        happened: origin.happened,
        orchestrator: origin.orchestrator,
        reply_to: origin.reply_to,
        outcome: None,
    };
    let namespace = Namespace::of(&saga);
    if let Some(step) = saga.step.strip_suffix(&namespace.suffix()) {
        saga.step = step.to_owned();
    }
    let key = FenceKey { saga: saga.saga, step: saga.step.clone(), occurrence, namespace };
    Ok(ClaimedIntent {
        owner,
        key,
        kind: row.try_get("type")?,
        intent: StoredIntent {
            cx: CommandContext { saga, message: origin.message, undoes: origin.undoes },
            payload: row.try_get("payload")?,
            prepared: row.try_get::<Option<Value>, _>("prepared")?.unwrap_or_default(),
        },
        trace: origin.trace,
        ready: row.try_get::<&str, _>("state")? == "ready",
        attempts: u32::try_from(row.try_get::<i32, _>("attempts")?).unwrap_or(u32::MAX),
    })
}
