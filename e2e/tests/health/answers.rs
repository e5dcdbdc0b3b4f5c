//! The answers of each process: `/livez`, `/readyz`, `/health` and the metrics, all of them, also what stays green.

use crate::broken::Broken;
use e2e::platform::{Platform, SETTLED_WITHIN};
use saga_core::{part::STALLED_AFTER, testkit::eventually};
use serde_json::Value;
use stack::service::Service;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// How long a fault may take to be seen, by the brokers' clients too. The next look sees it or the one after it,
/// however busy the machine is.
pub(crate) const SEEN: Duration = Duration::from_secs(60);
/// How long a look may take: a look that ended later than that after the fault began after it.
const LOOK: Duration = Duration::from_millis(2_500);

/// The names that are red, each with the causes of which it has one.
pub(crate) type Reds = &'static [(&'static str, &'static [&'static str])];

/// A process's expected answers: the names in `/readyz` (none: it is ready), and those in `/health` beside them. No
/// more and no less.
pub(crate) struct Says {
    pub(crate) service: Service,
    pub(crate) not_ready: Reds,
    pub(crate) red: Reds,
    /// Parts that `/health` may name, or not: whether they have work at that moment is chance.
    pub(crate) may: &'static [&'static str],
}

pub(crate) const fn not_ready(service: Service, not_ready: Reds, red: Reds) -> Says {
    Says { service, not_ready, red, may: &[] }
}

pub(crate) const fn stays_ready(service: Service, red: Reds) -> Says {
    not_ready(service, &[], red)
}

/// The process has nothing to do with the fault.
pub(crate) const fn fine(service: Service) -> Says {
    stays_ready(service, &[])
}

/// One of the answers, with its body; `None` while there is none.
async fn asked(platform: &Platform, service: Service, path: &str) -> Option<(u16, Value)> {
    let answer = platform.http.get(platform.admin(service, path)).send().await.ok()?;
    let status = answer.status().as_u16();
    Some((status, serde_json::from_str(&answer.text().await.ok()?).unwrap_or(Value::Null)))
}

/// The names that are not in order, with their causes.
fn reds<'a>(all: &'a Value, cause: impl Fn(&'a Value) -> Option<&'a str>) -> BTreeMap<&'a str, &'a str> {
    let all = all.as_object().into_iter().flatten();
    all.filter_map(|(name, it)| Some((name.as_str(), cause(it)?))).collect()
}

/// Whether these are the expected names, each with one of its causes.
fn is_exactly<'e>(
    found: &BTreeMap<&str, &str>,
    expected: impl Iterator<Item = &'e (&'static str, &'static [&'static str])>,
) -> bool {
    let expected: BTreeMap<_, _> = expected.copied().collect();
    found.keys().eq(expected.keys()) && found.iter().all(|(name, cause)| expected[name].contains(cause))
}

/// Whether all answers of a process are the expected ones, from a look that began after `broken`; otherwise what they
/// are.
async fn are(platform: &Platform, broken: Instant, says: &Says) -> Result<(), String> {
    let since_then = broken.elapsed();
    let ask = async |path: &str| asked(platform, says.service, path).await.ok_or(format!("{path}: no answer"));
    let (live, _) = ask("/livez").await?;
    let (status, ready) = ask("/readyz").await?;
    let (healthy, health) = ask("/health").await?;
    let otherwise = || Err(format!("/livez {live}, /readyz {status} {ready}, /health {healthy} {health}"));
    let age = Duration::from_secs_f64(ready["age_seconds"].as_f64().unwrap_or(f64::from(u16::MAX)));
    // A red part shows by itself that the look is new enough; a green one does not.
    if says.red.is_empty() && says.not_ready.is_empty() && age + LOOK > since_then {
        return Err(format!("its last look is {age:?} old"));
    }
    let not_ready = reds(&ready["checks"], |check| check.as_str().filter(|word| *word != "ok"));
    let red = reds(&health["parts"], |part| part["since"].is_string().then(|| part["cause"].as_str()).flatten());
    let mut sure = red.clone();
    sure.retain(|part, _| !says.may.contains(part));
    let statuses = [live, status, healthy];
    let expected = [200, if not_ready.is_empty() { 200 } else { 503 }, if red.is_empty() { 200 } else { 503 }];
    let all = says.not_ready.iter().chain(says.red);
    if statuses != expected || !is_exactly(&not_ready, says.not_ready.iter()) || !is_exactly(&sure, all) {
        return otherwise();
    }
    let checks = ready["checks"].as_object().ok_or("no checks")?;
    let ready = checks.keys().map(|check| {
        let value = if not_ready.contains_key(check.as_str()) { "0" } else { "1" };
        (format!("ready{{check=\"{check}\"}} "), value)
    });
    measured(platform, says, ready.collect(), &red).await
}

/// Checks that the metrics agree: of what is red, and of what is not.
async fn measured(
    platform: &Platform,
    says: &Says,
    ready: Vec<(String, &str)>,
    red: &BTreeMap<&str, &str>,
) -> Result<(), String> {
    let answer = platform.http.get(platform.admin(says.service, "/metrics")).send().await.map_err(|e| e.to_string())?;
    let metrics = answer.text().await.map_err(|e| e.to_string())?;
    let value = |series: &str| metrics.lines().find_map(|line| line.strip_prefix(series));
    for (series, expected) in ready {
        if value(&series) != Some(expected) {
            return Err(format!("/metrics says {:?} of {series}", value(&series)));
        }
    }
    for (part, cause) in red {
        let series = format!("work_stalled_seconds{{part=\"{part}\",reason=\"{cause}\"}} ");
        if value(&series).is_none_or(|value| value == "0") {
            return Err(format!("/metrics does not say that {part} stands still"));
        }
    }
    let stalled = |line| -> Option<_> {
        let (part, rest) = str::strip_prefix(line, "work_stalled_seconds{part=\"")?.split_once("\",reason=\"")?;
        let (cause, seconds) = rest.split_once("\"} ")?;
        (seconds != "0").then_some((part, cause))
    };
    let mut moves = metrics.lines().filter_map(stalled).filter(|(part, _)| !says.may.contains(part));
    match moves.find(|(part, cause)| red.get(part) != Some(cause)) {
        Some((part, cause)) => Err(format!("/metrics says that {part} stands still: {cause}")),
        None => Ok(()),
    }
}

pub(crate) async fn until_they_say(platform: &Platform, broken: Broken, says: &[Says]) {
    let begin = Instant::now();
    for says in says {
        let mut last = String::new();
        let said = tokio::time::timeout(SEEN, async {
            while let Err(otherwise) = are(platform, begin, says).await {
                last = otherwise;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(said.await.is_ok(), "{broken:?}: {} says {last}", says.service);
    }
}

/// Waits until a part is red with a reason, in words, that holds `said`.
pub(crate) async fn until_the_reason_is(platform: &Platform, service: Service, part: &str, said: &str) {
    eventually(SEEN, || async {
        let (_, health) = asked(platform, service, "/v1/health").await?;
        health["parts"][part]["reason"].as_str()?.contains(said).then_some(())
    })
    .await;
}

/// Waits until the processes answer so. They have to go on until work that stands still since then would be stalled: no
/// part turns red, or green, that should not.
pub(crate) async fn go_on_saying(platform: &Platform, broken: &[Broken], says: &[Says]) {
    if let Some(last) = broken.last() {
        until_they_say(platform, *last, says).await;
    }
    let (begin, longer) = (Instant::now(), STALLED_AFTER + LOOK);
    while begin.elapsed() < longer {
        for says in says {
            // All looks are later than that.
            let since = begin.checked_sub(SEEN).expect("the machine runs for longer");
            let said = are(platform, since, says).await;
            assert_eq!(said, Ok(()), "{broken:?}: {}, after {:?}", says.service, begin.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until everything is in order.
pub(crate) async fn until_healthy(platform: &Platform, after: Broken) {
    for service in Service::ALL {
        let mut last = Value::Null;
        let healthy = tokio::time::timeout(SETTLED_WITHIN, async {
            loop {
                match asked(platform, service, "/v1/health").await {
                    Some((200, _)) => return,
                    Some((_, health)) => last = health,
                    None => {}
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        assert!(healthy.await.is_ok(), "after {after:?}: {service} says {last}");
    }
}
