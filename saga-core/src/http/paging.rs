//! Keyset paging: `limit`, and an opaque `cursor` that holds the row after which the next page begins. A page costs the
//! same however deep it is, and rows that come and go in between shift nothing.

use super::problem::Problem;
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use time::OffsetDateTime;
use utoipa::ToSchema;

/// How many rows a page has: 1 to 200, 50 when not said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(try_from = "u32")]
#[schema(value_type = u32, minimum = 1, maximum = 200, default = 50)]
pub struct Limit(u32);

impl Limit {
    /// The most rows of a page.
    pub const MAX: u32 = 200;

    /// The limit as SQL wants it, plus one: the extra row shows whether there is a next page.
    #[must_use]
    pub fn and_one(self) -> i64 {
        i64::from(self.0) + 1
    }

    /// The limit as a number, 1 to 200.
    #[must_use]
    pub fn get(self) -> usize {
        self.0 as usize
    }
}

impl Default for Limit {
    fn default() -> Self {
        Self(50)
    }
}

impl TryFrom<u32> for Limit {
    type Error = String;
    fn try_from(limit: u32) -> Result<Self, String> {
        match limit {
            1..=Self::MAX => Ok(Self(limit)),
            _ => Err(format!("is a whole number from 1 to {}", Self::MAX)),
        }
    }
}

/// Where a page begins: opaque to clients, the last row's sort key to us.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct Cursor(String);

impl Cursor {
    /// The cursor after the row with this sort key.
    ///
    /// # Errors
    /// The key cannot be written as JSON.
    pub fn after<K: Serialize>(key: &K) -> Result<Self, serde_json::Error> {
        Ok(Self(BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(key)?)))
    }

    /// The sort key. A cursor that is not one of ours is the client's mistake.
    ///
    /// # Errors
    /// 400: the cursor is not one of ours.
    pub fn key<K: DeserializeOwned>(&self) -> Result<K, Problem> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(&self.0).ok();
        bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).ok_or_else(|| {
            Problem::malformed("The cursor is not one of ours.").with_field("cursor", "take it from the page before")
        })
    }
}

/// A time within a sort key, in the whole microseconds that PostgreSQL keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct TimeKey(pub OffsetDateTime);

impl From<TimeKey> for i64 {
    fn from(TimeKey(at): TimeKey) -> Self {
        at.unix_timestamp() * 1_000_000 + Self::from(at.microsecond())
    }
}

impl TryFrom<i64> for TimeKey {
    type Error = time::error::ComponentRange;
    fn try_from(micros: i64) -> Result<Self, Self::Error> {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1_000).map(Self)
    }
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct List<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where the next page begins; `null` on the last.
    pub next_cursor: Option<Cursor>,
}

impl<T> List<T> {
    /// A page of the rows that `limit.and_one()` brought; `key` gives a row's sort key.
    ///
    /// # Errors
    /// A key cannot be written as JSON.
    pub fn page<K: Serialize>(
        mut rows: Vec<T>,
        limit: Limit,
        key: impl Fn(&T) -> K,
    ) -> Result<Self, serde_json::Error> {
        let more = rows.len() > limit.get();
        rows.truncate(limit.get());
        let next_cursor = match rows.last() {
            Some(last) if more => Some(Cursor::after(&key(last))?),
            _ => None,
        };
        Ok(Self { items: rows, next_cursor })
    }

    /// Converts the page's rows.
    pub fn map<U>(self, convert: impl FnMut(T) -> U) -> List<U> {
        List { items: self.items.into_iter().map(convert).collect(), next_cursor: self.next_cursor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_of_a_page_is_its_last_row_and_the_last_page_has_none() {
        let limit = Limit::try_from(2).unwrap();
        let page = List::page(vec![1, 2, 3], limit, |row| *row).unwrap();
        assert_eq!(page.items, [1, 2]);
        assert_eq!(page.next_cursor.unwrap().key::<i32>().unwrap(), 2);
        let at = TimeKey(OffsetDateTime::from_unix_timestamp(-1).unwrap() + time::Duration::microseconds(7));
        assert_eq!(Cursor::after(&(at, 1)).unwrap().key::<(TimeKey, i32)>().unwrap(), (at, 1));
        assert!(Cursor::after(&(i64::MAX, 1)).unwrap().key::<(TimeKey, i32)>().is_err(), "no such year");
        assert_eq!(List::page(vec![1, 2], limit, |row| *row).unwrap().next_cursor, None);
    }

    #[test]
    fn a_cursor_that_is_not_ours_is_refused() {
        for wrong in ["", "xx", "bm8", "%%%"] {
            assert_eq!(Cursor(wrong.into()).key::<(i64, String)>().unwrap_err().status().as_u16(), 400);
        }
        assert!(Limit::try_from(0).is_err() && Limit::try_from(201).is_err());
    }
}
