//! Tries parked lines again, when an operator asked for it: in order, one row at a time, while nothing else is in flight.
//! So it is done in turns, and between two of them everything else goes on.
//!
//! A row is marked published in a transaction that holds it from before it is sent, so that it cannot be discarded
//! meanwhile. When the process dies in between, the row is sent again.

use crate::{
    commit::{CommitError, Progress},
    in_flight::{Decided, Flight, Ticket},
    parking::{self, Line},
    pause::{self, Cause, LeftBehind},
    record,
    refusal::Refusal,
    row::Row,
    session::{Ended, Session},
    topics,
};
use sqlx::Connection as _;
use std::{collections::HashMap, time::Duration};
use time::OffsetDateTime;
use tokio::{sync::oneshot, time::Instant};
use tracing::{info, warn};

/// Rows that are tried in one turn: each is a transaction and a request to Kafka, so this is about a second.
const ROWS_PER_TURN: usize = 200;
/// Between two turns: as long as a turn at its best, and long enough that lines which are done are not asked for any more.
const BETWEEN_TURNS: Duration = Duration::from_millis(500);

impl Session {
    pub(crate) async fn retry(&mut self, lines: &HashMap<Line, OffsetDateTime>) -> Result<(), Ended> {
        // Rows behind a parked one may be decided on, but not be in the table yet.
        self.settle().await?;
        let (told, recorded) = oneshot::channel();
        self.progress.send(Progress::Flush(told)).await.map_err(|_| CommitError::Fenced)?;
        recorded.await.map_err(|_| CommitError::Fenced)?;
        let mut left = ROWS_PER_TURN;
        for (line, requested) in lines {
            // It is asked for again when the topic resumes.
            if !self.paused.contains(&line.topic) {
                self.retry_line(line, *requested, &mut left).await?;
            }
            if left == 0 {
                let now = Instant::from_std(saga_core::clock::monotonic());
                self.retry_at = Some(now + BETWEEN_TURNS);
                break;
            }
        }
        Ok(())
    }

    /// Tries a line, until it is free, or refused again, or `left` rows are tried; then what was asked for stands.
    async fn retry_line(&mut self, line: &Line, requested: OffsetDateTime, left: &mut usize) -> Result<(), Ended> {
        if !topics::is_legal(&line.topic) {
            warn!(
                outbox = self.outbox,
                topic = line.topic,
                "no topic can have this name; the rows can only be discarded"
            );
            self.tried(line, requested, None).await?;
            return Ok(());
        }
        let limit = match self.look(&line.topic).await? {
            Ok(limit) => limit,
            Err((cause, reason)) => return self.put_off(line, cause, reason).await,
        };
        while let Some(outcome) = self.retry_row(line, limit, requested).await? {
            if let Err((id, reason)) = outcome {
                self.tried(line, requested, Some((id, &reason))).await?;
                return Ok(());
            }
            *left -= 1;
            if *left == 0 {
                return Ok(());
            }
        }
        self.tried(line, requested, None).await?;
        self.blocked.free(line);
        info!(outbox = self.outbox, topic = line.topic, "no row of the line is parked any more");
        Ok(())
    }

    /// The topic takes nothing now: it is paused, so that somebody asks when it does. Then its lines are tried again.
    async fn put_off(&mut self, line: &Line, cause: Cause, reason: String) -> Result<(), Ended> {
        warn!(outbox = self.outbox, topic = line.topic, reason, "parked rows cannot be tried again yet");
        self.paused.insert(line.topic.clone());
        let left = LeftBehind { topic: line.topic.clone(), cause, reason, position: self.at.clone() };
        // At once: everything before is recorded, and the session may be about to end.
        self.db.ask(async |db| pause::leave_in(db, &self.outbox, &left).await).await?;
        Ok(())
    }

    fn refused_again(&self, row: &Row, reason: &str) {
        record::span(row).in_scope(|| {
            let (id, topic) = (row.id(), row.topic());
            warn!(outbox = self.outbox, id, topic, reason, "a parked row was refused again");
        });
    }

    async fn tried(
        &self,
        line: &Line,
        requested: OffsetDateTime,
        failed: Option<(i64, &str)>,
    ) -> Result<(), sqlx::Error> {
        self.db.ask(async |db| parking::tried(db, &self.outbox, line, requested, failed).await).await
    }

    /// Tries the line's first row: its id, or why it was refused for good. `None` when there is none.
    async fn retry_row(
        &mut self,
        line: &Line,
        limit: usize,
        requested: OffsetDateTime,
    ) -> Result<Option<Result<i64, (i64, String)>>, Ended> {
        let database = self.db.clone();
        let mut db = database.connect().await?;
        let mut tx = database.within(db.begin()).await?;
        let Some(row) = database.within(parking::next_in(&mut tx, &self.outbox, line)).await? else {
            database.within(tx.rollback()).await?;
            db.give_back();
            return Ok(None);
        };
        let built = self.builder.build(&row);
        if built.size > limit {
            database.within(tx.rollback()).await?;
            db.give_back();
            let size = built.size;
            let reason = format!("the record has {size} bytes, and the topic takes {limit} (max.message.bytes)");
            self.refused_again(&row, &reason);
            return Ok(Some(Err((row.id(), reason))));
        }
        let number = self.publisher.in_flight.open(Flight::parked(&row));
        self.publisher.in_flight.seal(number, Decided { oldest: Some(row.created_at()), ..Decided::default() });
        let ticket = Ticket::new(number, 0);
        let sent = match self.offer(&row, built, ticket).await? {
            Some(code) => Err(Ended::Refused { id: Some(row.id()), code, alone: true }),
            None => self.acknowledged(ticket).await,
        };
        match sent {
            Ok(()) => {}
            // The producer is gone with it; the next session goes on.
            Err(Ended::Refused { code, .. }) if Refusal::of(code) == Refusal::Row => {
                database.within(tx.rollback()).await?;
                let reason = format!("Kafka refused it: {code}");
                self.refused_again(&row, &reason);
                self.tried(line, requested, Some((row.id(), &reason))).await?;
                return Err(Ended::Refused { id: None, code, alone: false });
            }
            Err(Ended::Refused { code, .. }) if let Refusal::Topic(cause) = Refusal::of(code) => {
                database.within(tx.rollback()).await?;
                self.put_off(line, cause, format!("Kafka says: {code}")).await?;
                return Err(Ended::Refused { id: None, code, alone: false });
            }
            Err(ended) => return Err(ended),
        }
        if !database.within(parking::published_in(&mut tx, &self.outbox, self.owner, row.id())).await? {
            return Err(CommitError::Fenced.into());
        }
        database.within(tx.commit()).await?;
        db.give_back();
        Ok(Some(Ok(row.id())))
    }
}
