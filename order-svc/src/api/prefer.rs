//! `Prefer: wait=N` (RFC 7240): how long a client would rather wait for the outcome than ask for it again.

use axum::extract::FromRequestParts;
use http::{HeaderMap, HeaderName, HeaderValue, request::Parts};
use std::{convert::Infallible, time::Duration};

/// The longest wait of a request, whatever its client prefers.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

const PREFER: HeaderName = HeaderName::from_static("prefer");
/// The response header that names the preference that was honoured.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// How long to wait; `None`: not at all. A preference that is not understood counts as none (RFC 7240, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreferWait(pub Option<Duration>);

impl PreferWait {
    fn read(headers: &HeaderMap) -> Self {
        let preferences = headers.get_all(PREFER).iter().filter_map(|value| value.to_str().ok());
        let seconds = preferences.flat_map(|value| value.split(',')).find_map(|preference| {
            let (name, value) = preference.split(';').next()?.split_once('=')?;
            let named_wait = name.trim().eq_ignore_ascii_case("wait");
            // The first `wait` counts, understood or not.
            named_wait.then(|| value.trim().trim_matches('"').parse::<u32>().ok())
        });
        let seconds = seconds.flatten().filter(|seconds| *seconds > 0);
        Self(seconds.map(|seconds| Duration::from_secs(seconds.into()).min(LONGEST_WAIT)))
    }
}

/// The value of `Preference-Applied` for a wait of this length.
pub fn applied(wait: Duration) -> HeaderValue {
    HeaderValue::from_str(&format!("wait={}", wait.as_secs())).unwrap_or(HeaderValue::from_static("wait"))
}

impl<S: Send + Sync> FromRequestParts<S> for PreferWait {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::read(&parts.headers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(values: &[&str]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(PREFER, value.parse().unwrap());
        }
        PreferWait::read(&headers).0.map(|wait| wait.as_secs())
    }

    #[test]
    fn a_wait_is_read_wherever_it_stands_and_capped() {
        assert_eq!(seconds(&["wait=5"]), Some(5));
        assert_eq!(seconds(&["respond-async, Wait = \"7\"; x=y"]), Some(7));
        assert_eq!(seconds(&["handling=lenient", "wait=2, wait=3"]), Some(2));
        assert_eq!(seconds(&["wait=100"]), Some(30));
    }

    #[test]
    fn what_is_not_understood_is_no_preference() {
        for value in ["", "wait", "wait=", "wait=x", "wait=-1", "wait=0", "wait=1.5", "wait=99999999999", "waits=3"] {
            assert_eq!(seconds(&[value]), None, "{value:?}");
        }
        assert_eq!(seconds(&[]), None);
    }
}
