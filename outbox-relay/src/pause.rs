//! What is not published at present: a topic, or the whole outbox.
//!
//! The other topics go on while one is paused, so a paused topic has a position of its own, recorded in the transaction
//! that moves the outbox's position past its rows. When it resumes, a lane reads the topic's rows from there until it
//! has caught up; meanwhile the main flow still passes over them. Nothing is parked for a pause.

use crate::{
    position::{Position, ReadError},
    reader::CaughtUp,
};
use sqlx::PgConnection;
use time::OffsetDateTime;

/// The name under which the whole outbox is paused; no legal topic name.
pub(crate) const WHOLE: &str = "*";

/// Why a topic is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Somebody wanted it.
    Operator,
    /// The topic is not there.
    Missing,
    /// This process may not write to it.
    Forbidden,
}

impl Cause {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Missing => "missing",
            Self::Forbidden => "forbidden",
        }
    }
}

/// A pause as it is recorded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Paused {
    pub(crate) topic: String,
    pub(crate) cause: Cause,
    pub(crate) paused_at: OffsetDateTime,
    /// An operator wants it to end, or the topic has appeared.
    pub(crate) resuming: bool,
    /// All of the topic's rows before it are published; `None` until the owner has seen the pause.
    pub(crate) position: Option<Position>,
}

type PauseColumns =
    (String, String, OffsetDateTime, Option<OffsetDateTime>, Option<String>, Option<String>, Option<i64>);

/// Everything that is paused.
pub(crate) async fn load(db: &mut PgConnection, outbox: &str) -> Result<Vec<Paused>, ReadError> {
    let found: Vec<PauseColumns> = sqlx::query_as(
        "select topic, cause, paused_at, resume_requested_at, base::text, target::text, after_id
           from outbox_pause
          where outbox = $1",
    )
    .bind(outbox)
    .fetch_all(db)
    .await?;
    let mut paused = Vec::with_capacity(found.len());
    for (topic, cause, paused_at, resume, base, target, after) in found {
        let cause = match cause.as_str() {
            "missing" => Cause::Missing,
            "forbidden" => Cause::Forbidden,
            _ => Cause::Operator,
        };
        let position = match (base, target, after) {
            (Some(base), Some(target), Some(after)) => {
                Some(Position { base: base.parse()?, target: target.parse()?, after })
            }
            _ => None,
        };
        paused.push(Paused { topic, cause, paused_at, resuming: resume.is_some(), position });
    }
    Ok(paused)
}

/// A topic that the owner leaves behind at a position.
#[derive(Debug, Clone)]
pub(crate) struct LeftBehind {
    pub(crate) topic: String,
    pub(crate) cause: Cause,
    pub(crate) reason: String,
    pub(crate) position: Position,
}

/// Records where a topic is left behind, in the transaction that moves the position past it. A pause that has a position
/// keeps it (the topic was catching up, and stopped again on the way); one that an operator asked for keeps its cause.
pub(crate) async fn leave_in(tx: &mut PgConnection, outbox: &str, left: &LeftBehind) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox_pause as pause (outbox, topic, cause, reason, actor, base, target, after_id)
         values ($1, $2, $3, $4, 'outbox-relay', $5::text::pg_snapshot, $6::text::pg_snapshot, $7)
         on conflict (outbox, topic) do update
            set base                = coalesce(pause.base, excluded.base),
                target              = coalesce(pause.target, excluded.target),
                after_id            = coalesce(pause.after_id, excluded.after_id)",
    )
    .bind(outbox)
    .bind(&left.topic)
    .bind(left.cause.as_str())
    .bind(&left.reason)
    .bind(left.position.base.to_string())
    .bind(left.position.target.to_string())
    .bind(left.position.after)
    .execute(tx)
    .await?;
    Ok(())
}

/// A topic that was catching up cannot: it waits again, for another reason than before.
pub(crate) async fn stall(
    db: &mut PgConnection,
    outbox: &str,
    topic: &str,
    cause: Cause,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_pause
            set resume_requested_at = null, cause = $3, reason = $4, paused_at = clock_timestamp()
          where outbox = $1 and topic = $2 and resume_requested_at is not null",
    )
    .bind(outbox)
    .bind(topic)
    .bind(cause.as_str())
    .bind(reason)
    .execute(db)
    .await?;
    Ok(())
}

/// The topic has caught up to here.
pub(crate) async fn advance_in(
    tx: &mut PgConnection,
    outbox: &str,
    topic: &str,
    position: &Position,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_pause
            set base = $3::text::pg_snapshot, target = $4::text::pg_snapshot, after_id = $5
          where outbox = $1 and topic = $2",
    )
    .bind(outbox)
    .bind(topic)
    .bind(position.base.to_string())
    .bind(position.target.to_string())
    .bind(position.after)
    .execute(tx)
    .await?;
    Ok(())
}

/// The topic has caught up and is paused no more.
pub(crate) async fn end_in(tx: &mut PgConnection, outbox: &str, caught_up: &CaughtUp) -> Result<(), sqlx::Error> {
    // Not if an operator paused it again in the meantime, whether or not he resumed that as well: the rows that were
    // passed over for that pause are found from its position alone.
    sqlx::query("delete from outbox_pause where outbox = $1 and topic = $2 and paused_at = $3")
        .bind(outbox)
        .bind(&*caught_up.topic)
        .bind(caught_up.paused_at)
        .execute(tx)
        .await?;
    Ok(())
}

/// The topic is there again: it resumes like one that an operator resumes.
pub(crate) async fn resume(db: &mut PgConnection, outbox: &str, topic: &str) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_pause
            set resume_requested_at = clock_timestamp()
          where outbox = $1 and topic = $2 and cause <> 'operator' and resume_requested_at is null",
    )
    .bind(outbox)
    .bind(topic)
    .execute(db)
    .await?;
    Ok(())
}

/// The topic takes nothing now, so it is paused; the owner records where it is left behind.
pub(crate) async fn begin(
    db: &mut PgConnection,
    outbox: &str,
    topic: &str,
    cause: Cause,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox_pause (outbox, topic, cause, reason, actor)
         values ($1, $2, $3, $4, 'outbox-relay')
         on conflict (outbox, topic) do nothing",
    )
    .bind(outbox)
    .bind(topic)
    .bind(cause.as_str())
    .bind(reason)
    .execute(db)
    .await?;
    Ok(())
}
