//! Looks up, a few times a second, what operators and brokers want of the owner: pauses, retries, and missing topics
//! that have appeared. The database is the only channel, so any replica's admin endpoints can be used.

use crate::{
    database::Database,
    loops::{Loops, WANTED},
    position::ReadError,
    record::{
        parking::{self, Lane},
        pause::{self, PauseCause, Paused, WHOLE},
    },
    topics::{TopicState, Topics},
};
use rdkafka::error::KafkaError;
use saga_core::part;
use sqlx::PgConnection;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};
use time::OffsetDateTime;
use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};
use tracing::{debug, info};

/// The pause between two looks; an operator waits at most this long for an effect.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often the relay asks the brokers about a topic that is not there.
const ASK_MISSING: Duration = Duration::from_secs(1);
/// How often it asks about a topic that is there but may not be written to: each try costs a producer.
const ASK_FORBIDDEN: Duration = Duration::from_secs(30);
/// How often it asks about a topic whose rows no broker takes.
const ASK_LEADERLESS: Duration = Duration::from_secs(2);
/// Up to so many missing topics the relay asks about one by one; for more, it asks for the names of all topics.
const FEW_TOPICS: usize = 8;

/// What operators and brokers want of the owner now.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Control {
    /// Whether an operator has paused the whole outbox.
    pub(crate) whole: bool,
    /// Topics that are not to be published, or are catching up.
    pub(crate) paused: HashMap<String, Paused>,
    /// Lanes of parked rows that are to be tried again.
    pub(crate) retry: HashMap<Lane, OffsetDateTime>,
}

/// Looks up what is wanted now.
pub(crate) async fn look(db: &mut PgConnection, outbox: &str) -> Result<Control, ReadError> {
    let mut paused: HashMap<String, Paused> =
        pause::load(db, outbox).await?.into_iter().map(|paused| (paused.topic.clone(), paused)).collect();
    let whole = paused.remove(WHOLE).is_some();
    Ok(Control { whole, paused, retry: parking::requested(db, outbox).await? })
}

/// Passes what is wanted on to the tasks that obey.
pub(crate) struct ControlWatch {
    outbox: String,
    control: Mutex<watch::Sender<Arc<Control>>>,
}

impl ControlWatch {
    pub(crate) fn new(outbox: &str, first: Control) -> (Self, watch::Receiver<Arc<Control>>) {
        let (control, seen) = watch::channel(Arc::new(first));
        (Self { outbox: outbox.to_owned(), control: Mutex::new(control) }, seen)
    }

    /// Looks, and passes on what is new. One look at a time: an earlier look must not overwrite a later one.
    pub(crate) async fn refresh(&self, db: &mut PgConnection) -> Result<Arc<Control>, ReadError> {
        let seen = self.control.lock().await;
        let control = Arc::new(look(db, &self.outbox).await?);
        seen.send_if_modified(|current| {
            let changed = **current != *control;
            if changed {
                *current = control.clone();
            }
            changed
        });
        Ok(control)
    }
}

/// The topics that metrics show as set apart, as the owner last saw them.
#[derive(Default)]
struct SetApart(HashSet<(String, &'static str)>);

impl SetApart {
    fn show(&mut self, outbox: &str, control: &Control) {
        let now: HashSet<_> =
            control.paused.values().map(|paused| (paused.topic.clone(), paused.cause.as_str())).collect();
        let gauge = |(topic, cause): &(String, &'static str)| metrics::gauge!("outbox_topic_set_apart", "outbox" => outbox.to_owned(), "topic" => topic.clone(), "cause" => *cause);
        self.0.difference(&now).for_each(|gone| gauge(gone).set(0.0));
        now.difference(&self.0).for_each(|new| gauge(new).set(1.0));
        self.0 = now;
    }
}

/// Keeps `wanted` up to date until an error.
pub(crate) async fn run(
    db: Database,
    topics: Topics,
    loops: Arc<Loops>,
    wanted: Arc<ControlWatch>,
) -> Result<(), ReadError> {
    let outbox = &wanted.outbox;
    let mut asked: HashMap<String, Instant> = HashMap::new();
    let mut set_apart = SetApart::default();
    loop {
        let now = Instant::from_std(saga_core::clock::monotonic());
        let control = match db.ask(async |db| wanted.refresh(db).await).await {
            Ok(control) => control,
            // Other work has all the connections. A database outage is reported elsewhere; here it only delays the next
            // attempt.
            Err(ReadError::Database(sqlx::Error::PoolTimedOut)) => {
                loops.failing(WANTED, part::Cause::PoolFull, "no connection was free to look it up");
                continue;
            }
            Err(error) => return Err(error),
        };
        loops.working(WANTED);
        loops.wait(&control.paused);
        asked.retain(|topic, _| control.paused.contains_key(topic));
        set_apart.show(outbox, &control);
        let missing = control.paused.values().filter(|paused| paused.cause == PauseCause::Missing && !paused.resuming);
        let named = if missing.count() > FEW_TOPICS { topics.named().await } else { None };
        for paused in control.paused.values().filter(|paused| !paused.resuming) {
            let every = match paused.cause {
                PauseCause::Operator | PauseCause::Refusing => continue,
                PauseCause::Leaderless => ASK_LEADERLESS,
                PauseCause::Missing => ASK_MISSING,
                PauseCause::Forbidden => ASK_FORBIDDEN,
            };
            // The first time, the brokers have refused a moment ago.
            let last = *asked.entry(paused.topic.clone()).or_insert(now);
            if now.duration_since(last) < every {
                continue;
            }
            asked.insert(paused.topic.clone(), now);
            if paused.cause == PauseCause::Missing && named.as_ref().is_some_and(|named| !named.contains(&paused.topic))
            {
                continue;
            }
            match look_again(&topics, paused).await {
                Ok(true) => {
                    info!(
                        outbox,
                        topic = paused.topic,
                        "the topic can be written to; its rows are published from where they were left"
                    );
                    match db.ask(async |db| pause::resume(db, outbox, &paused.topic).await).await {
                        // The next round asks about the topic again.
                        Ok(()) | Err(sqlx::Error::PoolTimedOut) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Ok(false) => {}
                Err(error) => debug!(outbox, topic = paused.topic, %error, "asking about a paused topic"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether the brokers' answer is now that the topic can be written to.
async fn look_again(topics: &Topics, paused: &Paused) -> Result<bool, KafkaError> {
    let ready = matches!(topics.look(&paused.topic).await?, TopicState::Ready { .. });
    Ok(ready && (paused.cause != PauseCause::Leaderless || !topics.lacks_leader(&paused.topic).await?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::PooledConnection;
    use saga_core::clock::DatabaseClock;
    use saga_core::testkit::{TestDatabase, brokers, eventually};
    use std::str::FromStr;
    use tokio_util::task::AbortOnDropHandle;

    #[tokio::test]
    async fn it_goes_on_when_all_connections_were_in_use_for_too_long() {
        let database = TestDatabase::new(&[saga_core::service::messaging_migrations()]).await;
        let options = sqlx::postgres::PgConnectOptions::from_str(&database.url).unwrap();
        let patience = Duration::from_millis(200);
        let db = Database::new(options, 2, patience);
        let (wanted, seen) = ControlWatch::new("orders", Control::default());
        let all = [db.connect().await.unwrap(), db.connect().await.unwrap()];
        let loops = Arc::new(Loops::new("all_connections".into()));
        let looking = run(db.clone(), Topics::new(&brokers()).unwrap(), loops.clone(), Arc::new(wanted));
        let looking = AbortOnDropHandle::new(tokio::spawn(looking));
        // These have the same patience and came later: by now `looking` has lost its own.
        assert!(matches!(db.connect().await, Err(sqlx::Error::PoolTimedOut)));
        assert!(matches!(db.connect().await, Err(sqlx::Error::PoolTimedOut)));
        let issue = loops.issue(&DatabaseClock::of("all_connections"));
        assert!(issue.is_some_and(|issue| issue.reason.contains("no connection")));
        all.into_iter().for_each(PooledConnection::give_back);
        sqlx::query(
            "insert into outbox_pause (outbox, topic, cause, reason, actor) values ('orders', '*', 'operator', '', '')",
        )
        .execute(&database.pool)
        .await
        .unwrap();
        eventually(Duration::from_secs(30), || async { seen.borrow().whole.then_some(()) }).await;
        assert!(!looking.is_finished());
    }
}
