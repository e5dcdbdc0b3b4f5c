//! Pauses: a topic that is set apart from the main stream, or the whole outbox.
//!
//! The other topics go on while one is set apart. So it has a position of its own, recorded in the transaction that
//! moves the outbox's position past its rows. When it resumes, a stream of its own publishes its rows from there. The
//! stream hands it back to the main stream when it has caught up; until then the main stream passes over its rows. No
//! row is parked for it.

use crate::position::{Position, ReadError};
use saga_core::{
    clock::{self, DatabaseClock},
    outbox::Tx,
    part::{self, HealthIssue},
};
use sqlx::PgConnection;
use std::time::Duration;
use time::OffsetDateTime;

/// The name under which the whole outbox is paused; no legal topic name.
pub(crate) const WHOLE: &str = "*";

/// Why a topic is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PauseCause {
    /// An operator wanted it.
    Operator,
    /// The topic is not there.
    Missing,
    /// This process may not write to the topic.
    Forbidden,
    /// No broker takes its rows: a partition has no leader, or one that cannot be reached.
    Leaderless,
    /// Kafka refused rows of it. It goes on at once, in a stream of its own.
    Refusing,
}

impl PauseCause {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Missing => "missing",
            Self::Forbidden => "forbidden",
            Self::Leaderless => "leaderless",
            Self::Refusing => "refusing",
        }
    }

    /// Whether the topic takes no row at all: its name may be invented.
    pub(crate) fn is_absence(self) -> bool {
        matches!(self, Self::Missing | Self::Forbidden)
    }

    /// Reads a recorded cause. A cause of a later build waits for an operator.
    fn parse(text: &str) -> Self {
        let all = [Self::Missing, Self::Forbidden, Self::Leaderless, Self::Refusing];
        all.into_iter().find(|cause| cause.as_str() == text).unwrap_or(Self::Operator)
    }
}

/// A pause, as the database has it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Paused {
    pub(crate) topic: String,
    pub(crate) cause: PauseCause,
    /// The reason, in words.
    pub(crate) reason: String,
    pub(crate) paused_at: OffsetDateTime,
    /// Whether the pause is to end: an operator wants that, or the topic has appeared.
    pub(crate) resuming: bool,
    /// The position before which all of the topic's rows are published; `None` until the owner has seen the pause.
    pub(crate) position: Option<Position>,
}

impl Paused {
    /// The issue that the pause is for the topic's rows, as long as they wait.
    pub(crate) fn issue(&self, clock: &DatabaseClock) -> HealthIssue {
        let cause = match self.cause {
            PauseCause::Operator => part::Cause::Paused,
            PauseCause::Missing => part::Cause::TopicMissing,
            PauseCause::Forbidden => part::Cause::KafkaForbidden,
            PauseCause::Leaderless => part::Cause::Leaderless,
            PauseCause::Refusing => part::Cause::Refused,
        };
        let age = Duration::from_secs_f64(clock.since(self.paused_at));
        let reason = format!("rows of topic {:?} wait: {}", self.topic, self.reason);
        HealthIssue { since: clock::monotonic().checked_sub(age), ..HealthIssue::new(cause, reason) }
    }
}

type PauseColumns =
    (String, String, String, OffsetDateTime, Option<OffsetDateTime>, Option<String>, Option<String>, Option<i64>);

/// Reads all pauses of an outbox.
pub(crate) async fn load(db: &mut PgConnection, outbox: &str) -> Result<Vec<Paused>, ReadError> {
    let found: Vec<PauseColumns> = sqlx::query_as(
        "select topic, cause, reason, paused_at, resume_requested_at, base::text, target::text, after_id
           from outbox_pause
          where outbox = $1",
    )
    .bind(outbox)
    .fetch_all(db)
    .await?;
    let mut paused = Vec::with_capacity(found.len());
    for (topic, cause, reason, paused_at, resume, base, target, after) in found {
        let position = match (base, target, after) {
            (Some(base), Some(target), Some(after)) => {
                Some(Position { base: base.parse()?, target: target.parse()?, after })
            }
            _ => None,
        };
        let cause = PauseCause::parse(&cause);
        paused.push(Paused { topic, cause, reason, paused_at, resuming: resume.is_some(), position });
    }
    Ok(paused)
}

/// A topic that the owner leaves behind at a position.
#[derive(Debug, Clone)]
pub(crate) struct LeftBehind {
    pub(crate) topic: String,
    pub(crate) cause: PauseCause,
    pub(crate) reason: String,
    pub(crate) position: Position,
}

/// Records where a topic is left behind, in the transaction that moves the position past it. A pause that has a
/// position keeps it (the topic was catching up, and stopped again on the way); one that an operator asked for keeps
/// its cause. A topic that refuses rows resumes at once: its stream finds out which they are.
pub(crate) async fn leave_in(tx: &mut Tx<'_>, outbox: &str, left: &LeftBehind) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into outbox_pause as pause
                (outbox, topic, cause, reason, actor, base, target, after_id, resume_requested_at)
         values ($1, $2, $3, $4, 'outbox-relay', $5::text::pg_snapshot, $6::text::pg_snapshot, $7,
                 case when $3 = 'refusing' then clock_timestamp() end)
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
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Lets a topic that was catching up wait again, for another reason than before.
pub(crate) async fn stall(
    db: &mut PgConnection,
    outbox: &str,
    topic: &str,
    cause: PauseCause,
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

/// Records how far a topic has caught up. The position never moves backward ([`Position::includes`] in SQL): what was
/// published would be published again.
pub(crate) async fn advance_in(
    tx: &mut Tx<'_>,
    outbox: &str,
    topic: &str,
    position: &Position,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_pause as pause
            set base = $3::text::pg_snapshot, target = $4::text::pg_snapshot, after_id = $5
          where outbox = $1 and topic = $2
            and (base is null
                 or base::text = $3::text and target::text = $4::text and after_id <= $5
                 or pg_snapshot_xmax(target) <= pg_snapshot_xmax($3::text::pg_snapshot)
                    and not exists (select
                                      from pg_snapshot_xip($3::text::pg_snapshot) as running (xid)
                                     where pg_visible_in_snapshot(running.xid, pause.target)))",
    )
    .bind(outbox)
    .bind(topic)
    .bind(position.base.to_string())
    .bind(position.target.to_string())
    .bind(position.after)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// A topic that has caught up: the main stream publishes it from here on.
#[derive(Debug, Clone)]
pub(crate) struct CaughtUp {
    pub(crate) topic: String,
    /// When its pause began: a later pause of the topic is another pause.
    pub(crate) paused_at: OffsetDateTime,
}

/// Ends the pause of a topic that has caught up.
pub(crate) async fn end_in(tx: &mut Tx<'_>, outbox: &str, caught_up: &CaughtUp) -> Result<(), sqlx::Error> {
    // The pause stays if an operator paused the topic again in the meantime, even if that pause was resumed as well.
    // Only its position leads to the rows that were passed over for it.
    sqlx::query("delete from outbox_pause where outbox = $1 and topic = $2 and paused_at = $3")
        .bind(outbox)
        .bind(&caught_up.topic)
        .bind(caught_up.paused_at)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Resumes a topic that is there again, like one that an operator resumes.
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

/// Pauses a topic that takes nothing now; the owner records where it is left behind.
pub(crate) async fn begin(
    db: &mut PgConnection,
    outbox: &str,
    topic: &str,
    cause: PauseCause,
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

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::{service::messaging_migrations, testkit::TestDatabase};

    fn at(base: &str, target: &str, after: i64) -> Position {
        Position { base: base.parse().unwrap(), target: target.parse().unwrap(), after }
    }

    #[tokio::test]
    async fn the_position_of_a_topic_that_catches_up_never_moves_backward() {
        let database = TestDatabase::new(&[messaging_migrations()]).await;
        let mut db = database.pool.begin().await.unwrap();
        let positions = [
            at("5:5:", "10:10:", 0),
            at("5:5:", "10:10:", 40),
            at("10:10:", "10:10:", 0),
            at("10:10:", "20:20:", 7),
            // A transaction was running at the window's end, and at the next window's.
            at("10:10:", "12:20:12", 7),
            at("12:20:12", "12:30:12", 3),
            at("20:20:", "30:30:", 1),
            at("30:30:", "30:30:", 0),
        ];
        let mut moves = 0;
        for from in &positions {
            for to in &positions {
                sqlx::query("delete from outbox_pause").execute(&mut *db).await.unwrap();
                let (topic, reason) = ("t".to_owned(), String::new());
                let left = LeftBehind { topic, cause: PauseCause::Operator, reason, position: from.clone() };
                leave_in(&mut db, "orders", &left).await.unwrap();
                advance_in(&mut db, "orders", "t", to).await.unwrap();
                let forward = to.includes(from);
                let expected = if forward { to } else { from };
                let found = load(&mut db, "orders").await.unwrap().remove(0).position;
                assert_eq!(found.as_ref(), Some(expected), "from {from:?} to {to:?}");
                moves += usize::from(forward);
            }
        }
        assert_eq!(moves, 33, "of 64 pairs go forward or stay");
        // A pause that the owner has not seen has no position yet.
        sqlx::query("update outbox_pause set base = null, target = null, after_id = null")
            .execute(&mut *db)
            .await
            .unwrap();
        advance_in(&mut db, "orders", "t", &positions[0]).await.unwrap();
        assert_eq!(load(&mut db, "orders").await.unwrap().remove(0).position.as_ref(), Some(&positions[0]));
    }

    #[test]
    fn a_cause_is_read_as_it_was_written_and_a_later_builds_waits_for_an_operator() {
        for (text, cause, absent) in [
            ("operator", PauseCause::Operator, false),
            ("missing", PauseCause::Missing, true),
            ("forbidden", PauseCause::Forbidden, true),
            ("leaderless", PauseCause::Leaderless, false),
            ("refusing", PauseCause::Refusing, false),
        ] {
            assert_eq!((PauseCause::parse(text), cause.as_str(), cause.is_absence()), (cause, text, absent));
        }
        assert_eq!(PauseCause::parse("of a later build"), PauseCause::Operator);
    }
}
