//! A stream: rows of the outbox in order, with a position, a pace and errors of its own. The main stream has the rows
//! of all topics but those that are set apart; each of these has a stream of its own, which hands its topic back when
//! it has caught up (see `session/handover`). A stream is one session after another.
//!
//! When the process dies, the streams go on from their recorded positions: the main stream's in the batch log, a
//! topic's beside the reason why it is set apart.

use crate::{
    budget::Area,
    loops::MAIN,
    owner_error::{OwnerError, joined},
    position::Position,
    publish::{
        kafka_record::RecordBuilder,
        producer::Publisher,
        session::{LOOK_AT_PRODUCER, ReturningTopic, ReturningTopics, Session, SessionEnd, StreamScope, StreamState},
        shared::Shared,
    },
    read::{
        cursor::Cursor,
        reader::{Follower, Reader},
    },
    record::pause::{PauseCause, Paused},
};
use saga_core::{clock, part, retry::Backoff};
use std::{collections::HashSet, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, Interval, MissedTickBehavior},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::warn;

/// How many pages are read ahead of the producer.
const PAGES_AHEAD: usize = 3;
/// The pauses between two sessions: short when one found out why it failed, long when one after the other fails.
const PAUSES: Backoff = Backoff::doubling(Duration::from_millis(20), Duration::from_secs(5)).exact();

/// Runs the main stream, until the process stops.
pub(crate) async fn run_main(shared: &Arc<Shared>, at: Position) -> Result<(), OwnerError> {
    let mut stream_state = StreamState::at(at);
    loop {
        let mut control = shared.control.clone();
        tokio::select! {
            () = shared.stop.cancelled() => return Ok(()),
            wanted = control.wait_for(|control| !control.whole) => drop(wanted),
        }
        shared.flush().await?;
        let now = shared.refresh().await?;
        shared.forget_those_back();
        let paused = now.paused.iter().filter(|(_, paused)| paused.position.is_some());
        let paused = paused.map(|(topic, _)| topic.clone()).collect();
        shared.main.send_replace(stream_state.at.clone());
        let scope = StreamScope::Main { returning: ReturningTopics::default() };
        let (ended, left) = session(shared, shared.areas.main.clone(), scope, stream_state, paused).await?;
        stream_state = left;
        match &ended {
            SessionEnd::Stopped => return Ok(()),
            SessionEnd::Paused | SessionEnd::Stuck(_) | SessionEnd::Joined | SessionEnd::Stalled(_) => {}
            SessionEnd::Refused { .. } | SessionEnd::GaveUp(_) => {
                warn!(outbox = shared.outbox, reason = %ended, "the producer is rebuilt");
                // The first failure is over as soon as it is noticed.
                if stream_state.failures > 1 {
                    shared.loops.failing(MAIN, part::Cause::Refused, &ended.to_string());
                }
                rest(stream_state.failures, &shared.stop).await;
            }
            _ => return Err(failure(ended)),
        }
    }
}

/// Runs the stream of a topic that is set apart, until the topic is handed back or waits for something.
pub(crate) async fn run_topic(shared: &Arc<Shared>, topic: &str) -> Result<(), OwnerError> {
    let mut stream_state = None::<StreamState>;
    loop {
        let area = tokio::select! {
            () = shared.stop.cancelled() => return Ok(()),
            area = shared.areas.topic() => area,
        };
        let Some((paused, at)) = resuming(shared, topic).await? else { return Ok(()) };
        let mut remembered = stream_state.take().unwrap_or_else(|| StreamState::at(at.clone()));
        if paused.cause == PauseCause::Refusing {
            remembered.refused_at.get_or_insert_with(|| Instant::from_std(clock::monotonic()));
        }
        remembered.at = at;
        let not_before = remembered.refused_at.map(|at| at + shared.set_apart_for);
        let scope = StreamScope::Topic(Box::new(ReturningTopic::new(topic.to_owned(), paused.paused_at, not_before)));
        let (ended, left) = session(shared, area, scope, remembered, HashSet::new()).await?;
        match &ended {
            SessionEnd::Stopped | SessionEnd::Joined | SessionEnd::Stalled(_) => return Ok(()),
            SessionEnd::Refused { .. } | SessionEnd::GaveUp(_) => {
                warn!(outbox = shared.outbox, topic, reason = %ended, "the producer of this topic is rebuilt");
                if left.failures > 1 {
                    shared.loops.failing(topic, part::Cause::Refused, &ended.to_string());
                }
                rest(left.failures, &shared.stop).await;
            }
            // The next round looks up again whether the topic may go on.
            SessionEnd::Paused | SessionEnd::Stuck(_) => {}
            _ => return Err(failure(ended)),
        }
        stream_state = Some(left);
    }
}

/// The position from which the topic's stream goes on, if the topic is set apart and may go on.
async fn resuming(shared: &Shared, topic: &str) -> Result<Option<(Paused, Position)>, OwnerError> {
    shared.flush().await?;
    let control = shared.refresh().await?;
    let paused = control.paused.get(topic).filter(|paused| paused.resuming && !control.whole);
    let paused = paused.filter(|paused| !shared.has_resumed(topic, paused.paused_at));
    Ok(paused.and_then(|paused| Some((paused.clone(), paused.position.clone()?))))
}

fn failure(ended: SessionEnd) -> OwnerError {
    match ended {
        SessionEnd::Commit(error) => error.into(),
        SessionEnd::Read(error) => error.into(),
        SessionEnd::Database(error) => error.into(),
        SessionEnd::Producer(error) => error.into(),
        ended => OwnerError::Session(ended.to_string()),
    }
}

/// Waits before the next session, longer with each failure since the last progress.
async fn rest(failures: u32, stop: &CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = tokio::time::sleep(PAUSES.delay(failures, 0)) => {}
    }
}

/// Runs one producer's life, from the stream's position to the last that can be recorded of it.
async fn session(
    shared: &Arc<Shared>,
    area: Arc<Area>,
    scope: StreamScope,
    stream_state: StreamState,
    paused: HashSet<String>,
) -> Result<(SessionEnd, StreamState), OwnerError> {
    let publisher = Publisher::new(&shared.kafka)?;
    match &scope {
        StreamScope::Main { .. } => {
            shared.blocked.load(&shared.db, &shared.outbox, |topic| !paused.contains(topic)).await?;
        }
        StreamScope::Topic(leaving) => {
            shared.blocked.load(&shared.db, &shared.outbox, |topic| topic == leaving.topic).await?;
        }
    }
    let mut control = shared.control.clone();
    let (items, pages) = mpsc::channel(PAGES_AHEAD);
    let (pages_done, done) = watch::channel(0);
    let at = stream_state.at.clone();
    let mut reader = AbortOnDropHandle::new(match &scope {
        StreamScope::Main { .. } => {
            let reader = Reader::new(Cursor::new(at.clone(), None, area.clone()), control.clone(), items, done);
            tokio::spawn(reader.run(shared.reading.clone(), shared.nudges.clone()))
        }
        StreamScope::Topic(leaving) => {
            let cursor = Cursor::new(at.clone(), Some(leaving.topic.as_str().into()), area.clone());
            tokio::spawn(Follower { cursor, main: shared.main.subscribe(), items }.run(shared.reading.clone()))
        }
    });
    control.mark_changed();
    let mut session = Session {
        shared: shared.clone(),
        scope,
        area,
        outbox: shared.outbox.clone(),
        db: shared.db.clone(),
        topics: shared.topics.clone(),
        publisher,
        builder: RecordBuilder::new(&shared.outbox, shared.epoch.clone(), shared.clock.clone()),
        stream_state,
        blocked: shared.blocked.clone(),
        paused,
        at,
        control,
        look_at: looks(),
        progress: shared.progress.clone(),
        pages_done,
        stop: shared.stop.clone(),
    };
    let ended = session.run(pages).await;
    // Reading ends first: what it reads from here on is of no use.
    let read = if matches!(ended, SessionEnd::Reader) {
        joined("reading the outbox", (&mut reader).await)
    } else {
        Ok(Ok(()))
    };
    drop(reader);
    let stream_state = session.finish(&ended).await;
    read??;
    Ok((ended, stream_state))
}

fn looks() -> Interval {
    let mut looks = tokio::time::interval(LOOK_AT_PRODUCER);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}
