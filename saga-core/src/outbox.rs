//! The outbox: messages written in the transaction that changes the state they report.
//!
//! The caller keeps two rules of an append. The append comes *after* the statement that locks the aggregate, and that
//! lock is held to the commit. Then the order of ids along a key is the order of commits along that key. A process that
//! dies before its commit has sent nothing; after the commit, the relay sends the messages.
//!
//! ```no_run
//! use saga_core::{outbox::{self, AppendError, NewMessage}, transaction::{Bound, Transaction}};
//! use std::time::Duration;
//!
//! /// The order and the message that reports it are committed together, or neither is.
//! async fn ship(pool: &sqlx::PgPool, order: uuid::Uuid) -> Result<(), AppendError> {
//!     let mut tx = Transaction::begin(pool, Bound::new(Duration::from_secs(5))).await?;
//!     sqlx::query("update orders set status = 'shipped' where id = $1").bind(order).execute(&mut **tx).await?;
//!     let shipped = NewMessage::tombstone("orders.open", &order.to_string(), "order_shipped.v1");
//!     outbox::append_in(&mut tx, &[shipped]).await?;
//!     Ok(tx.commit().await?)
//! }
//! ```

use crate::{
    clock,
    envelope::{Envelope, Headers, SagaHeaders, exact, header},
    fail_point::fail_point,
    id::MessageId,
    topic, trace,
};
use futures::TryStreamExt as _;
use serde::Serialize;
use sqlx::{AssertSqlSafe, Either, PgConnection, PgExecutor, PgPool, Row as _, postgres::PgArguments, types::Json};
use std::{borrow::Cow, time::Duration};

/// The caller's transaction. Work that takes it is atomic with the rest of that transaction.
pub type Tx<'a> = sqlx::Transaction<'a, sqlx::Postgres>;

/// A statement whose parameters are being bound.
pub(crate) type Statement<'q> = sqlx::query::Query<'q, sqlx::Postgres, PgArguments>;

/// The channel that nudges go to, in the outbox's own database: `notify outbox`.
pub const NUDGES: &str = "outbox";
/// A nudge that takes longer is given up: the relay's next look finds the row.
const NUDGE_MAX: Duration = Duration::from_secs(1);

/// A message to be published once the transaction commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMessage {
    /// `ce_id`; the consumers' inboxes know the message by it.
    pub id: MessageId,
    /// The topic's name.
    pub topic: String,
    /// The record key: the aggregate's or the saga's id. Messages of one key stay in order.
    pub key: String,
    /// `ce_type`.
    pub kind: String,
    /// The record's value; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Further headers, beside those that the other fields become.
    pub headers: Headers,
}

impl NewMessage {
    /// A message with a JSON payload, a new id, and the current span's trace context.
    ///
    /// # Errors
    /// If `payload` cannot be written as JSON.
    pub fn json<T: Serialize>(topic: &str, key: &str, kind: &str, payload: &T) -> Result<Self, serde_json::Error> {
        let payload = serde_json::to_vec(payload)?;
        let mut message = Self { payload: Some(payload), ..Self::tombstone(topic, key, kind) };
        message.headers.insert(header::CONTENT_TYPE.into(), "application/json".into());
        Ok(message)
    }

    /// A message without a value: on a compacted topic it means that the key is gone.
    pub fn tombstone(topic: &str, key: &str, kind: &str) -> Self {
        let mut headers = Headers::new();
        trace::inject_current(&mut headers);
        Self {
            id: MessageId(clock::uuid()),
            topic: topic.into(),
            key: key.into(),
            kind: kind.into(),
            payload: None,
            headers,
        }
    }

    /// Adds the saga headers of a command or a reply.
    #[must_use]
    pub fn with_saga(mut self, saga: &SagaHeaders) -> Self {
        saga.write_to(&mut self.headers);
        self
    }

    /// Continues what `cause` belongs to: its correlation id, and its trace, unless the current span is of that trace
    /// already. (The span of a batch of many has a trace of its own.)
    #[must_use]
    pub fn caused_by(mut self, cause: &Envelope) -> Self {
        if let Some(id) = cause.correlation_id() {
            self.headers.insert(header::CORRELATION_ID.into(), id.into());
        }
        let trace = |parent: &String| parent.split('-').nth(1).map(str::to_owned);
        let ours = self.headers.get(header::TRACEPARENT).and_then(trace);
        let theirs = cause.traceparent.as_ref().and_then(trace);
        if theirs.is_some() && ours != theirs {
            let theirs = [(header::TRACEPARENT, &cause.traceparent), (header::TRACESTATE, &cause.tracestate)];
            for (name, value) in theirs {
                self.headers.remove(name);
                value.iter().for_each(|value| drop(self.headers.insert(name.into(), value.clone())));
            }
        }
        self
    }

    /// Whether it could ever be published. What PostgreSQL or Kafka would refuse later is refused here. So it fails the
    /// transaction that made it and not the relay.
    pub(crate) fn validate(&self) -> Result<(), InvalidMessage> {
        if !topic::is_legal_name(&self.topic) {
            return Err(InvalidMessage::Topic(self.topic.chars().take(topic::NAME_MAX).collect()));
        }
        if self.kind.is_empty() || self.kind.contains('\0') {
            return Err(InvalidMessage::Kind);
        }
        if self.key.contains('\0') {
            return Err(InvalidMessage::Key);
        }
        let is_exact = |name: &str, value: &str| name == exact::EXACT && exact::read(value).is_some();
        let wrong = |(name, value): &(&Cow<'static, str>, &String)| {
            name.contains('\0') || value.contains('\0') || name.is_empty() && !is_exact(name, value)
        };
        match self.headers.iter().find(wrong) {
            Some((name, _)) => Err(InvalidMessage::Header(name.to_string())),
            None => Ok(()),
        }
    }
}

/// Why a message can never be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// No message can go to a topic of this name.
    #[error(
        "{0:?} is not a topic: 1 to {max} characters of a-z, A-Z, 0-9, '.', '_' and '-', neither '.' nor '..', and not \
         beginning with '__'",
        max = topic::NAME_MAX
    )]
    Topic(String),
    /// A message must have a type.
    #[error("the type is empty or contains NUL")]
    Kind,
    /// PostgreSQL's text cannot hold a NUL, so the key must have none.
    #[error("the key contains NUL")]
    Key,
    /// A header needs a name, and PostgreSQL's `jsonb` cannot hold a NUL.
    #[error("header {0:?} has an empty name or contains NUL")]
    Header(String),
}

/// Why messages were not appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// One message can never be published; nothing was written.
    #[error("message {id} cannot be published")]
    Invalid {
        /// The message's id.
        id: MessageId,
        /// Why it can never be published.
        source: InvalidMessage,
    },
    /// The database returned an error.
    #[error("{0}")]
    Database(#[from] sqlx::Error),
}

/// For functions that know only the database's errors: an invalid message becomes one that cannot be encoded.
impl From<AppendError> for sqlx::Error {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Database(error) => error,
            invalid @ AppendError::Invalid { .. } => Self::Encode(Box::new(invalid)),
        }
    }
}

/// Appends `messages`, in their order, in the caller's transaction: one statement, whatever their number.
///
/// Call it after the statement that locks the aggregate, and hold that lock to the commit. A service that commits with
/// `synchronous_commit = off` can lose a row that was published.
///
/// # Errors
/// When a message can never be published, or the database returns an error.
pub async fn append_in(tx: &mut Tx<'_>, messages: &[NewMessage]) -> Result<(), AppendError> {
    append_keyed_in(tx, messages, own_keys(messages)).await
}

/// The same as [`append_in`], with keys that may be absent in place of the messages' own: a dead letter has the key of
/// its record.
pub(crate) async fn append_keyed_in(
    tx: &mut Tx<'_>,
    messages: &[NewMessage],
    keys: Vec<Option<&str>>,
) -> Result<(), AppendError> {
    if messages.is_empty() {
        return Ok(());
    }
    bind(sqlx::query(insert_messages!()), messages, keys)?.execute(&mut **tx).await?;
    Ok(())
}

/// Commits a transaction of the caller's own in which messages were appended. Then nudges the relay ([`nudge`]) over a
/// connection of `pool`, which is of the same database. Do not pass a transaction in which a statement failed:
/// PostgreSQL answers its commit with a rollback, and the driver calls that a success.
///
/// # Errors
/// That of the commit. If the connection was lost, the commit is in doubt: it may have happened, and the relay then
/// finds the messages by itself. A caller that made the ids itself can look for them.
pub async fn commit(tx: Tx<'static>, pool: &PgPool) -> Result<(), sqlx::Error> {
    fail_point!("outbox.before-commit", database_of(pool).as_str());
    tx.commit().await?;
    fail_point!("outbox.after-commit", database_of(pool).as_str());
    nudge(pool);
    Ok(())
}

/// The database's name, by which tests distinguish a machine's outboxes.
#[cfg(feature = "testkit")]
fn database_of(pool: &PgPool) -> String {
    pool.connect_options().get_database().unwrap_or_default().to_owned()
}

/// Nudges the relay after a commit, so that it looks at once and not after its pause. Returns at once: a task sends the
/// nudge, over a connection of `pool` if there is one to spare. A nudge is a hint. If it is lost, the relay's next look
/// finds the row: a few milliseconds later while there is traffic, 0.1 s when there was none for a while.
///
/// The library nudges for a consumer's batches, for sagas that start by themselves and for what [`commit`] commits.
/// Call this after committing messages in another way, and *after* that commit. Never notify within a business
/// transaction: PostgreSQL lets such transactions commit only one after another. Needs a tokio runtime around it.
pub fn nudge(pool: &PgPool) {
    if has_one_to_spare(pool) {
        let pool = pool.clone();
        tokio::spawn(async move { tell(&pool).await });
    }
}

/// Whether `pool` has an idle connection, or may open one.
pub(crate) fn has_one_to_spare(pool: &PgPool) -> bool {
    pool.num_idle() > 0 || pool.size() < pool.options().get_max_connections()
}

/// The same as [`nudge`], over a connection that has just committed.
pub(crate) async fn nudge_with(connection: &mut PgConnection) {
    tell(connection).await;
}

/// The SQL of a nudge, in a transaction of its own. It does not wait for the disk, as a notification does not survive a
/// crash anyway. Nor does it wait long for other notifiers, which all commit one after another.
const TELL: &str = "set local synchronous_commit = off; set local lock_timeout = '100ms'; notify outbox";

async fn tell(connection: impl PgExecutor<'_>) {
    let notified = tokio::time::timeout(NUDGE_MAX, sqlx::raw_sql(TELL).execute(connection)).await;
    if let Ok(Err(error)) = notified {
        tracing::debug!(%error, "the relay was not nudged");
    }
}

/// What follows a commit in the same round trip.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Next<'a> {
    /// Whether to nudge the relay, like [`nudge`].
    pub(crate) tell: bool,
    /// The SQL that begins the next transaction on this connection, whose last column says whether it shall go on;
    /// `None`: none.
    pub(crate) begin: Option<&'a str>,
}

/// Commits, nudges the relay, and begins the next transaction on the same connection: one round trip instead of three.
/// Returns the next transaction if it has begun.
///
/// # Errors
/// The same as [`commit`]. An error in a statement after the commit is ignored: the commit already happened. If such a
/// statement *hangs*, the commit is in doubt like one whose connection was lost, because PostgreSQL answers all of it
/// at once. So none of them waits long.
pub(crate) async fn commit_and_begin(mut tx: Tx<'static>, next: Next<'_>) -> Result<Option<Tx<'static>>, sqlx::Error> {
    let tell = if next.tell { format!("begin; {TELL}; commit;") } else { String::new() };
    // A `begin` comes in any case: dropping the connection rolls back, and the server warns when there is nothing to
    // roll back.
    let begin = next.begin.unwrap_or("begin");
    let mut answers = sqlx::raw_sql(AssertSqlSafe(format!("commit; {tell} {begin}"))).fetch_many(&mut *tx);
    // This is the answer to the commit.
    let Some(Either::Left(_)) = answers.try_next().await? else {
        return Err(sqlx::Error::Protocol("there is no answer to a commit".into()));
    };
    let begun = async {
        let mut begun = false;
        while let Some(answer) = answers.try_next().await? {
            if let Either::Right(row) = answer {
                begun = row.try_get(row.len() - 1)?;
            }
        }
        Ok::<_, sqlx::Error>(begun)
    };
    let begun = begun.await;
    drop(answers);
    match begun {
        Ok(begun) => Ok(begun.then_some(tx)),
        Err(error) => {
            tracing::debug!(%error, "the next transaction did not begin with the commit");
            sqlx::raw_sql("begin").execute(&mut *tx).await.ok();
            Ok(None)
        }
    }
}

/// The append as SQL, of messages that are the parameters 1 to 6. Statements that write a batch's outcome contain it as
/// well, because each further statement is a round trip while locks are held.
//
// `order by ordinality`: without it ids are given in any order, and the order of ids is the order of publishing.
macro_rules! insert_messages {
    ($($only:literal)?) => {
        concat!(
            "insert into outbox (message_id, topic, key, type, payload, headers)
             select message_id, topic, key, type, payload, headers
               from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bytea[], $6::jsonb[])
                    with ordinality as message (message_id, topic, key, type, payload, headers, ordinality) ",
            $($only,)?
            " order by ordinality"
        )
    };
}
pub(crate) use insert_messages;

/// Binds the parameters of [`insert_messages`], with the messages' own keys.
pub(crate) fn bind_messages<'q>(
    statement: Statement<'q>,
    messages: &'q [NewMessage],
) -> Result<Statement<'q>, AppendError> {
    bind(statement, messages, own_keys(messages))
}

fn own_keys(messages: &[NewMessage]) -> Vec<Option<&str>> {
    messages.iter().map(|message| Some(message.key.as_str())).collect()
}

fn bind<'q>(
    statement: Statement<'q>,
    messages: &'q [NewMessage],
    keys: Vec<Option<&'q str>>,
) -> Result<Statement<'q>, AppendError> {
    for message in messages {
        message.validate().map_err(|source| AppendError::Invalid { id: message.id, source })?;
    }
    let column = |of: fn(&NewMessage) -> &str| messages.iter().map(of).collect::<Vec<_>>();
    Ok(statement
        .bind(messages.iter().map(|message| message.id.0).collect::<Vec<_>>())
        .bind(column(|message| &message.topic))
        .bind(keys)
        .bind(column(|message| &message.kind))
        .bind(messages.iter().map(|message| message.payload.as_deref()).collect::<Vec<_>>())
        .bind(messages.iter().map(|message| Json(&message.headers)).collect::<Vec<_>>()))
}
