//! Times in a saga's JSON: whole milliseconds since 1970, thirteen digits instead of thirty characters.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use std::time::Duration;
use time::{OffsetDateTime, PrimitiveDateTime};

/// As fine as the state is stored, so that what is decided twice is the same before and after a crash.
pub(super) fn cut(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_millisecond(at.millisecond()).unwrap_or(at)
}

/// So much later; a time that no calendar has (year 10,000 and on) is the last one that it has.
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

/// The same for a time that may not be there.
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
