//! One outbox row as it was read: a view into the bytes that PostgreSQL sent, copied only when the producer takes it.
//!
//! A page carries the small columns of a row. For a large column it carries the size. The body is read when the row's
//! turn comes, so that the size of a page is known before it is fetched. A body that no topic takes by default is not
//! even read then: the session reads it once it knows that the row will be sent.

use sqlx::{PgConnection, Row as _, postgres::PgRow};
use std::sync::OnceLock;
use time::OffsetDateTime;
use uuid::Uuid;

/// Bytes up to which a column comes with its page: the payload, the headers as they are stored, and the key and the
/// type.
const PAYLOAD_INLINE: usize = 3_072;
const HEADERS_INLINE: usize = 1_024;
const KEY_INLINE: usize = 256;
/// The most bytes, about, of a row that comes whole with its page.
pub(crate) const INLINE_BYTES: usize = PAYLOAD_INLINE + HEADERS_INLINE + 2 * KEY_INLINE;
/// A body up to this size is read with its page: Kafka's default for `max.message.bytes`. A larger one is read when the
/// topic is known to take it.
pub(crate) const READ_AHEAD_BYTES: usize = 1_048_588;
/// The bytes that a row takes here, and in Kafka's client, beside its own.
pub(crate) const OVERHEAD_BYTES: usize = 512;
/// The log line about a row that is gone when its body is read.
pub(crate) const DELETED: &str = "the row was deleted from the outbox before it was published; it is left out";

/// A time as [`OffsetDateTime`] can hold it, and RFC 3339 can write it. PostgreSQL knows infinity and many more years,
/// on which sqlx panics. The outbox refuses them as well, but may have had such rows before it did.
macro_rules! within_calendar {
    ($time:literal) => {
        concat!("least(greatest(", $time, ", '0001-01-01 00:00:00+00'), '9999-12-31 23:59:59.999999+00')")
    };
}
pub(crate) use within_calendar;

/// Whether the headers are as large as they look: compressed ones may be of any size.
macro_rules! small_headers {
    () => {
        "pg_column_size(headers) <= 1024 and pg_column_compression(headers) is null"
    };
}
pub(crate) use small_headers;

/// The columns of a row, in the order that [`Row`] reads them; the numbers are [`PAYLOAD_INLINE`], [`HEADERS_INLINE`],
/// [`KEY_INLINE`]. PostgreSQL knows the length of a column that is stored apart without reading it. Only large headers
/// it writes out as text, once. An empty header object is not sent at all; nearly all are small or empty.
macro_rules! columns {
    () => {
        concat!(
            "id, message_id, topic, \
             case when octet_length(key) <= 256 then key end as key, \
             case when octet_length(type) <= 256 then type end as type, \
             case when octet_length(payload) <= 3072 then payload end as payload, \
             case when ",
            crate::row::small_headers!(),
            " then nullif(headers, '{}')::text end as header_text, ",
            crate::row::within_calendar!("created_at"),
            " as created_at, \
             case when coalesce(octet_length(key), 0) <= 256 and octet_length(type) <= 256 \
                       and coalesce(octet_length(payload), 0) <= 3072 and ",
            crate::row::small_headers!(),
            " then null \
                  else array[octet_length(payload), octet_length(headers::text), octet_length(key), octet_length(type)] \
             end as sizes"
        )
    };
}
pub(crate) use columns;

/// The columns of `columns!` for a row that comes whole, whatever its size.
macro_rules! whole_columns {
    () => {
        concat!(
            "id, message_id, topic, key, type, payload, nullif(headers, '{}')::text, ",
            crate::row::within_calendar!("created_at"),
            ", null::integer[]"
        )
    };
}
pub(crate) use whole_columns;

/// An outbox row, as PostgreSQL sent it.
pub(crate) struct Row {
    read: PgRow,
    id: i64,
    /// Bytes of key, type, payload and headers as they came. They are stored because decoding a column takes long.
    as_read: usize,
    /// The sizes of its columns, if something was too large to come with the page.
    sizes: Option<Box<Sizes>>,
    /// The part that was too large to come with the page, once it is read.
    body: OnceLock<Body>,
    /// A key that was too large to come with the page, while the row's body is not read yet.
    large_key: Option<String>,
}

/// The sizes of a large row's columns, in bytes.
struct Sizes {
    payload: Option<usize>,
    headers: usize,
    key: usize,
    kind: usize,
}

impl Sizes {
    fn new(sizes: &[Option<i32>]) -> Self {
        let size = |at: usize| sizes.get(at).copied().flatten().and_then(|size| usize::try_from(size).ok());
        let or_none = |at| size(at).unwrap_or(0);
        Self { payload: size(0), headers: or_none(1), key: or_none(2), kind: or_none(3) }
    }

    fn total(&self) -> usize {
        self.payload.unwrap_or(0) + self.headers + self.key + self.kind
    }
}

/// The part of a large row that a page leaves out.
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
    /// Reads the bodies of these rows, in no order. A row that was deleted meanwhile is not among them.
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
        // Everything else is read where a failure is not handled, so it is checked here once. The statement fixes the
        // types, and text columns are valid UTF-8 because the connection's encoding is UTF-8.
        read.try_get::<OffsetDateTime, _>(7)?;
        let sizes: Option<Vec<Option<i32>>> = read.try_get_unchecked(8)?;
        let sizes = sizes.map(|sizes| Box::new(Sizes::new(&sizes)));
        let length = |column: usize| read.try_get_raw(column).ok()?.as_bytes().ok().map(<[u8]>::len);
        let as_read = (3..=6).filter_map(length).sum();
        Ok(Self { read, id, as_read, sizes, body: OnceLock::new(), large_key: None })
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

    /// The `ce_type`; empty while a large type's row has no body read.
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
        match &self.sizes {
            Some(sizes) => sizes.payload,
            None => self.payload().map(<[u8]>::len),
        }
    }

    /// The JSON object of further headers, unless it is empty.
    pub(crate) fn headers(&self) -> Option<&str> {
        match self.body.get() {
            Some(body) => body.header_text.as_deref(),
            None => self.get(6),
        }
    }

    pub(crate) fn created_at(&self) -> OffsetDateTime {
        self.get(7)
    }

    /// Bytes of key, type, headers and payload. The record of the row is larger.
    pub(crate) fn bytes(&self) -> usize {
        match &self.sizes {
            Some(sizes) => sizes.total(),
            None => self.as_read,
        }
    }

    /// Bytes that the row takes with its body.
    pub(crate) fn cost(&self) -> usize {
        self.bytes().saturating_add(OVERHEAD_BYTES)
    }

    /// Bytes that the row takes as it came with its page.
    pub(crate) fn cost_as_read(&self) -> usize {
        OVERHEAD_BYTES + self.as_read
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
        self.sizes.is_some() && self.body.get().is_none()
    }

    /// Whether the key has still to be read before the row's fate can be decided.
    pub(crate) fn lacks_key(&self) -> bool {
        let is_large = self.sizes.as_ref().is_some_and(|sizes| sizes.key > KEY_INLINE);
        is_large && self.large_key.is_none() && self.lacks_body()
    }

    pub(crate) fn set_body(&self, body: Body) {
        // The body was read twice: the row is never changed, so both are the same.
        self.body.set(body).ok();
    }

    pub(crate) fn set_key(&mut self, key: Option<String>) {
        self.large_key = key;
    }
}
