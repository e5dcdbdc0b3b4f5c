//! How far a partition has been read, kept in the database for other parts that wait for it
//! ([`Handler::says_how_far_it_read`]).
//!
//! Now and then the worker's process asks the broker where the partition ends. When the worker has done all before
//! that, everything that was there at the moment of the question has been taken. `inbox_partition.read_until` then
//! becomes that moment. A partition without an owner, or whose broker, database or worker is away, falls behind by
//! itself: nothing updates its row any more.
//!
//! [`Handler::says_how_far_it_read`]: super::Handler::says_how_far_it_read

use super::failure::AttemptFailure;
use crate::{
    brokers::Inquirer,
    clock,
    fail_point::fail_point,
    inbox::InboxPlace,
    transaction::{Bound, Transaction},
};
use sqlx::PgPool;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;
use uuid::Uuid;

/// How long after one reading the next one begins.
const RECORD_EVERY: Duration = Duration::from_secs(2);
/// How long the broker or the database may take for an answer; a process that stops may have to wait for that of the
/// broker.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// One partition, as long as one worker has it.
pub(super) struct ReadMark {
    pub(super) brokers: Arc<Inquirer>,
    pub(super) pool: PgPool,
    pub(super) group: String,
    pub(super) topic: String,
    pub(super) partition: i32,
    /// The worker's id: when another worker has taken the partition, nothing is written.
    pub(super) owner: Uuid,
    /// The offset after what is done: at first the group's committed offset, negative if there is none.
    pub(super) done: watch::Receiver<i64>,
}

impl ReadMark {
    /// Writes it again and again, until this is dropped or the worker is gone.
    pub(super) async fn say(mut self) {
        loop {
            let (asked, before) = (clock::monotonic(), *self.done.borrow());
            // A partition that ends before records that were done already lost its tail, or is another topic's: its records
            // have not been read.
            if let Some((begin, end)) = self.range().await.filter(|(_, end)| before <= *end) {
                // Records that no broker has any more need not be read.
                if self.done.wait_for(|done| begin.max(*done) >= end).await.is_err() {
                    return;
                }
                let passed = || -> Result<(), AttemptFailure> {
                    fail_point!("consumer.before-read-until", &self.group);
                    Ok(())
                };
                if passed().is_err() {
                    return;
                }
                let bound = Bound::new(ANSWER_MAX);
                if let Err(error) = bound.within(self.write(bound, asked.elapsed())).await {
                    tracing::debug!(topic = self.topic, partition = self.partition, %error, "how far it was read was not said");
                }
            }
            tokio::time::sleep(RECORD_EVERY).await;
        }
    }

    /// The partition's first offset, and the offset after its last.
    async fn range(&self) -> Option<(i64, i64)> {
        let (topic, partition) = (self.topic.clone(), self.partition);
        let asked = self.brokers.ask(move |client| {
            client.fetch_watermarks(&topic, partition, ANSWER_MAX).or_else(|error| {
                // This shows whether the partition has no leader, or the client reaches no broker and is to be replaced.
                client.fetch_metadata(Some(&topic), ANSWER_MAX)?;
                Err(error)
            })
        });
        let asked = asked.await;
        asked
            .inspect_err(|error| {
                tracing::debug!(topic = self.topic, partition = self.partition, %error, "where a partition ends is not known");
            })
            .ok()
    }

    async fn write(&self, bound: Bound, ago: Duration) -> Result<(), sqlx::Error> {
        let place = InboxPlace { consumer: &self.group, topic: &self.topic, partition: self.partition };
        let mut tx = Transaction::begin(&self.pool, bound).await?;
        sqlx::query(
            "update inbox_partition
                set read_until = clock_timestamp() - make_interval(secs => $5)
              where consumer = $1 and topic = $2 and partition = $3 and owner = $4",
        )
        .bind(place.consumer)
        .bind(place.topic)
        .bind(place.partition)
        .bind(self.owner)
        .bind(clock::seconds(ago))
        .execute(&mut **tx)
        .await?;
        tx.commit_quietly().await
    }
}
