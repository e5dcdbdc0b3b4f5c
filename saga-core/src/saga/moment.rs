//! Times in a saga's JSON: whole milliseconds since 1970, thirteen digits instead of thirty characters.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::time::Duration;
use time::{OffsetDateTime, PrimitiveDateTime};

/// Cuts a time to the milliseconds in which the state is stored, so that a decision is the same before and after a
/// crash.
pub(super) fn cut(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_millisecond(at.millisecond()).unwrap_or(at)
}

/// Adds `by`. A sum that the calendar does not have (year 10,000 and on) becomes the last time that it has.
pub(super) fn after(at: OffsetDateTime, by: Duration) -> OffsetDateTime {
    let by = by.try_into().unwrap_or(time::Duration::MAX);
    cut(at.checked_add(by).unwrap_or(LAST))
}

const LAST: OffsetDateTime = PrimitiveDateTime::MAX.assume_utc();

fn to_millis(at: OffsetDateTime) -> i64 {
    at.unix_timestamp() * 1000 + i64::from(at.millisecond())
}

fn from_millis<E: Error>(millis: i64) -> Result<OffsetDateTime, E> {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).map_err(E::custom)
}

pub(super) fn serialize<S: Serializer>(at: &OffsetDateTime, to: S) -> Result<S::Ok, S::Error> {
    to_millis(*at).serialize(to)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<OffsetDateTime, D::Error> {
    from_millis(i64::deserialize(from)?)
}

/// The milliseconds of a time that may be absent.
pub(super) mod option {
    use super::{Deserialize, Deserializer, OffsetDateTime, Serialize, Serializer, from_millis, to_millis};

    pub(in super::super) fn serialize<S: Serializer>(at: &Option<OffsetDateTime>, to: S) -> Result<S::Ok, S::Error> {
        at.map(to_millis).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<OffsetDateTime>, D::Error> {
        Option::<i64>::deserialize(from)?.map(from_millis).transpose()
    }
}
