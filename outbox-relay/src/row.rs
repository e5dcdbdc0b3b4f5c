//! One outbox row as it was read: a view into the bytes that PostgreSQL sent, copied only when the producer takes it.
//!
//! A page carries small rows whole. Of a larger row it carries the size and what decides about the row; its body is read
//! when the row's turn comes, so that the size of a page is known before it is fetched. A body that no topic takes by
//! default is not even read then: the session reads it once it knows that the row is to be sent.

use sqlx::{PgConnection, Row as _, postgres::PgRow};
use std::sync::OnceLock;
use time::OffsetDateTime;
use uuid::Uuid;

/// Bytes of key, type, headers and payload up to which a row comes whole with its page.
pub(crate) const INLINE_BYTES: i64 = 4 * 1024;
/// A body up to this size is read with its page: Kafka's default for `max.message.bytes`. A larger one is read when the
/// topic is known to take it.
pub(crate) const READ_AHEAD_BYTES: usize = 1_048_588;
/// What a row takes here, and in Kafka's client, beside its bytes.
pub(crate) const OVERHEAD: usize = 512;
/// Bytes of a key or of a type up to which they come with the page of a larger row.
const INLINE_TEXT: i32 = 512;

/// What is said of a row that is not there any more when its body is read.
pub(crate) const DELETED: &str = "the row was deleted from the outbox before it was published; it is left out";

/// A time as [`OffsetDateTime`] can hold it, and RFC 3339 can say it. PostgreSQL knows infinity and many more years, which
/// sqlx does not refuse but panics on; the outbox refuses them as well, but may have had such rows before it did.
macro_rules! within_calendar {
    ($time:literal) => {
        concat!("least(greatest(", $time, ", '0001-01-01 00:00:00+00'), '9999-12-31 23:59:59.999999+00')")
    };
}
pub(crate) use within_calendar;

/// The columns of a row of [`sized!`], in the order that [`Row`] reads them. `4096` is [`INLINE_BYTES`], `512` is
/// [`INLINE_TEXT`]. Headers of 2048 bytes come with it in any case: they say whose row it is. An empty header object, as nearly all are small or empty, is not sent at all.
macro_rules! columns {
    () => {
        concat!(
            "id, message_id, topic, \
             case when bytes <= 4096 or octet_length(key) <= 512 then key end as key, \
             case when bytes <= 4096 or octet_length(type) <= 512 then type end as type, \
             case when bytes <= 4096 then payload end as payload, \
             coalesce(octet_length(payload), -1) as size, \
             case when bytes <= 4096 or octet_length(header_text) <= 2048 then header_text end as header_text, ",
            crate::row::within_calendar!("created_at"),
            " as created_at, bytes, coalesce(octet_length(key), 0) as key_bytes"
        )
    };
}
pub(crate) use columns;

/// A table of rows with the size of each. The lengths of toasted columns are known without reading them, but for the
/// headers': those PostgreSQL writes out as text once, whatever is asked of them (`offset 0`).
macro_rules! sized {
    ($table:literal) => {
        concat!(
            $table,
            " cross join lateral (
                  select header_text,
                         octet_length(type)::bigint + coalesce(octet_length(key), 0)
                             + coalesce(octet_length(payload), 0) + coalesce(octet_length(header_text), 0) as bytes
                    from (select nullif(headers, '{}')::text as header_text) as text
                  offset 0) as size"
        )
    };
}
pub(crate) use sized;

/// An outbox row.
pub(crate) struct Row {
    read: PgRow,
    id: i64,
    /// What was too large to come with the page.
    body: OnceLock<Body>,
    /// A key that was too large to come with the page of a row whose body is not read yet.
    large_key: Option<String>,
}

/// What a page leaves out of a large row.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) id: i64,
    key: Option<String>,
    kind: String,
    payload: Option<Vec<u8>>,
    header_text: Option<String>,
}

type BodyColumns = (i64, Option<String>, String, Option<Vec<u8>>, Option<String>);

impl Body {
    /// The bodies of these rows, in no order. A row that was deleted meanwhile is not among them.
    pub(crate) async fn read(db: &mut PgConnection, ids: &[i64]) -> Result<Vec<Self>, sqlx::Error> {
        let found: Vec<BodyColumns> = sqlx::query_as(
            "select id, key, type, payload, nullif(headers, '{}')::text from outbox where id = any ($1)",
        )
        .bind(ids)
        .fetch_all(db)
        .await?;
        let body = |(id, key, kind, payload, header_text)| Self { id, key, kind, payload, header_text };
        Ok(found.into_iter().map(body).collect())
    }
}

impl Row {
    pub(crate) fn new(read: PgRow) -> Result<Self, sqlx::Error> {
        let id = read.try_get_unchecked(0)?;
        // Everything else is read where a failure is not handled, so it is looked at here once: types are given by the
        // statement, and text columns are valid UTF-8 because the connection's encoding is UTF-8.
        read.try_get::<OffsetDateTime, _>(8)?;
        Ok(Self { read, id, body: OnceLock::new(), large_key: None })
    }

    fn get<'r, T>(&'r self, index: usize) -> T
    where
        T: sqlx::Decode<'r, sqlx::Postgres>,
    {
        self.read.try_get_unchecked(index).expect("the statement's columns have these types")
    }

    pub(crate) fn id(&self) -> i64 {
        self.id
    }

    pub(crate) fn message_id(&self) -> Uuid {
        self.get(1)
    }

    pub(crate) fn topic(&self) -> &str {
        self.get(2)
    }

    pub(crate) fn key(&self) -> Option<&str> {
        match self.body.get() {
            Some(body) => body.key.as_deref(),
            None => self.large_key.as_deref().or_else(|| self.get(3)),
        }
    }

    /// The `ce_type`; empty while the body of a row is not read whose type is large.
    pub(crate) fn kind(&self) -> &str {
        match self.body.get() {
            Some(body) => &body.kind,
            None => self.get::<Option<&str>>(4).unwrap_or_default(),
        }
    }

    /// The payload; `None` is a tombstone, once the body is read.
    pub(crate) fn payload(&self) -> Option<&[u8]> {
        match self.body.get() {
            Some(body) => body.payload.as_deref(),
            None => self.get(5),
        }
    }

    /// The payload's size; `None` for a tombstone.
    pub(crate) fn size(&self) -> Option<usize> {
        usize::try_from(self.get::<i32>(6)).ok()
    }

    /// The JSON object of further headers, unless it is empty.
    pub(crate) fn headers(&self) -> Option<&str> {
        match self.body.get() {
            Some(body) => body.header_text.as_deref(),
            None => self.get(7),
        }
    }

    pub(crate) fn created_at(&self) -> OffsetDateTime {
        self.get(8)
    }

    /// Bytes of key, type, headers and payload. The record of the row is larger.
    pub(crate) fn bytes(&self) -> usize {
        usize::try_from(self.get::<i64>(9)).unwrap_or(usize::MAX)
    }

    /// Bytes that it takes with its body.
    pub(crate) fn cost(&self) -> usize {
        self.bytes().saturating_add(OVERHEAD)
    }

    /// Bytes that it takes as it came with its page.
    pub(crate) fn cost_as_read(&self) -> usize {
        let text = self.key().map_or(0, str::len) + self.kind().len() + self.headers().map_or(0, str::len);
        OVERHEAD + text + self.payload().map_or(0, <[u8]>::len)
    }

    /// Bytes that are still to be read with its page: its body, or the key where the body is read later.
    pub(crate) fn lacking(&self) -> usize {
        match (self.lacks_body(), self.is_read_alone()) {
            (true, false) => self.bytes(),
            (true, true) if self.lacks_key() => READ_AHEAD_BYTES,
            _ => 0,
        }
    }

    /// Whether its body is read only when its topic is known to take it.
    pub(crate) fn is_read_alone(&self) -> bool {
        self.bytes() > READ_AHEAD_BYTES
    }

    /// Whether the body has still to be read before the row can be sent.
    pub(crate) fn lacks_body(&self) -> bool {
        self.get::<i64>(9) > INLINE_BYTES && self.body.get().is_none()
    }

    /// Whether the key has still to be read before it is known what becomes of the row.
    pub(crate) fn lacks_key(&self) -> bool {
        self.get::<i32>(10) > INLINE_TEXT && self.large_key.is_none() && self.lacks_body()
    }

    pub(crate) fn set_body(&self, body: Body) {
        // It was read twice: the row is never changed, so both are the same.
        self.body.set(body).ok();
    }

    pub(crate) fn set_key(&mut self, key: Option<String>) {
        self.large_key = key;
    }
}
