//! One outbox row as it was read: a view into the bytes that PostgreSQL sent, copied only when the producer takes it.

use sqlx::{Row as _, postgres::PgRow};
use time::OffsetDateTime;
use uuid::Uuid;

/// A payload up to this size comes with its page; a larger one is fetched when its turn comes, so that a page of rows
/// has a bounded size whatever is in it.
pub(crate) const INLINE_PAYLOAD: i32 = 16 * 1024;

/// A time as [`OffsetDateTime`] can hold it, and RFC 3339 can say it. PostgreSQL knows infinity and many more years, which
/// sqlx does not refuse but panics on; the outbox refuses them as well, but may have had such rows before it did.
macro_rules! within_calendar {
    ($time:literal) => {
        concat!("least(greatest(", $time, ", '0001-01-01 00:00:00+00'), '9999-12-31 23:59:59.999999+00')")
    };
}
pub(crate) use within_calendar;

/// The columns of a row, in the order that [`Row`] reads them. Header objects are nearly always empty or small: an empty
/// one is not sent at all. `16384` is [`INLINE_PAYLOAD`].
macro_rules! columns {
    () => {
        concat!(
            "id, message_id, topic, key, type, \
             case when octet_length(payload) <= 16384 then payload end as payload, \
             coalesce(octet_length(payload), -1) as size, \
             nullif(headers, '{}')::text as headers, ",
            crate::row::within_calendar!("created_at"),
            " as created_at"
        )
    };
}
pub(crate) use columns;

/// An outbox row.
pub(crate) struct Row {
    read: PgRow,
    id: i64,
    /// The payload is still to be fetched, if it is a large one.
    partial: bool,
    /// A payload that was too large to come with its page.
    large: Option<Vec<u8>>,
}

impl Row {
    pub(crate) fn new(read: PgRow) -> Result<Self, sqlx::Error> {
        let id = read.try_get_unchecked(0)?;
        // Everything else is read where a failure is not handled, so it is looked at here once: types are given by the
        // statement, and text columns are valid UTF-8 because the connection's encoding is UTF-8.
        read.try_get::<OffsetDateTime, _>(8)?;
        Ok(Self { read, id, partial: true, large: None })
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
        self.get(3)
    }

    pub(crate) fn kind(&self) -> &str {
        self.get(4)
    }

    pub(crate) fn payload(&self) -> Option<&[u8]> {
        self.large.as_deref().or_else(|| self.get(5))
    }

    /// The payload's size; `None` for a tombstone.
    pub(crate) fn size(&self) -> Option<usize> {
        usize::try_from(self.get::<i32>(6)).ok()
    }

    /// The JSON object of further headers, unless it is empty.
    pub(crate) fn headers(&self) -> Option<&str> {
        self.get(7)
    }

    pub(crate) fn created_at(&self) -> OffsetDateTime {
        self.get(8)
    }

    /// Whether the payload has still to be fetched.
    pub(crate) fn wants_payload(&self) -> bool {
        self.partial && self.get::<i32>(6) > INLINE_PAYLOAD
    }

    /// It was read with its payload, whatever the size.
    pub(crate) fn is_whole(&mut self) {
        self.partial = false;
    }

    pub(crate) fn set_payload(&mut self, payload: Vec<u8>) {
        self.large = Some(payload);
        self.partial = false;
    }
}
