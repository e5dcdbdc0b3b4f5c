//! A fault in the relay itself, a panic, ends the outbox that it happens to and no other.

mod common;

use common::{PATIENCE, Running, World, is_red, payloads};
use outbox_relay::{Relay, RelaySettings, admin};
use saga_core::{
    part::Cause,
    service::Health,
    testkit::{eventually, read_to_end},
};
use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
};
use tokio_util::sync::CancellationToken;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer, Registry,
    layer::{Context, SubscriberExt as _},
};

/// A log that panics at a line of the outbox `sick`, in the task that writes the line.
#[derive(Clone, Default)]
struct FaultyLog(Arc<Mutex<Fault>>);

#[derive(Default)]
struct Fault {
    /// How the line begins; empty: none does.
    at: &'static str,
    panics: usize,
}

#[derive(Default)]
struct Line {
    outbox: String,
    message: String,
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "outbox" => self.outbox = format!("{value:?}"),
            "message" => self.message = format!("{value:?}"),
            _ => {}
        }
    }
}

impl<S: Subscriber> Layer<S> for FaultyLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut fault = self.0.lock().unwrap();
        if line.outbox == "sick" && !fault.at.is_empty() && line.message.starts_with(fault.at) {
            fault.panics += 1;
            drop(fault);
            panic!("a fault at {:?}", line.message);
        }
    }
}

impl FaultyLog {
    fn panic_at(&self, at: &'static str) {
        self.0.lock().unwrap().at = at;
    }

    fn panics(&self) -> usize {
        self.0.lock().unwrap().panics
    }
}

/// Two outboxes of one relay, whose log is faulty.
struct Beside {
    sick: World,
    healthy: World,
    health: Health,
    log: FaultyLog,
    _heard: tracing::subscriber::DefaultGuard,
    running: Running,
}

impl Beside {
    async fn new() -> Self {
        let log = FaultyLog::default();
        let _heard = tracing::subscriber::set_default(Registry::default().with(log.clone()));
        let sick = World { name: "sick".into(), ..World::new().await };
        let healthy = World { name: "healthy".into(), ..World::new().await };
        let outboxes = [&sick, &healthy].map(|world| world.settings().outboxes.remove(0)).into();
        let relay = Relay::new(&RelaySettings { outboxes, ..sick.settings() }).unwrap();
        let health = Health::new(&CancellationToken::new());
        admin::check_health(&health, &relay);
        let beside = Self { sick, healthy, health, log, _heard, running: Running::of(relay) };
        for world in [&beside.sick, &beside.healthy] {
            world.append("k", "0").await;
            world.published(1).await;
        }
        beside
    }

    async fn is_red(&self) -> Option<String> {
        is_red(&self.health, "outbox:sick", "a fault at").await
    }

    /// The fault comes again and again: it is said with the outbox's name, and the other outbox publishes.
    async fn goes_on_without_the_sick(&self) {
        eventually(PATIENCE, || self.is_red()).await;
        assert_eq!(self.health.healthiness().parts["outbox:sick"].cause, Some(Cause::Fault));
        for i in 1..=20 {
            self.sick.append("k", &i.to_string()).await;
            self.healthy.append("k", &i.to_string()).await;
        }
        self.healthy.published(21).await;
        eventually(PATIENCE, || async { (self.log.panics() >= 3).then_some(()) }).await;
        self.health.look().await;
        assert_eq!(self.health.healthiness().parts["outbox:healthy"].cause, None);
        assert_eq!(payloads(&read_to_end(&self.sick.topic).await, "k"), ["0"]);
    }

    /// The fault is over: the outbox resumes by itself.
    async fn resumes(self) {
        self.log.panic_at("");
        let expected: Vec<String> = (0..=20).map(|i| i.to_string()).collect();
        assert_eq!(payloads(&self.sick.published(21).await, "k"), expected);
        assert_eq!(payloads(&self.healthy.published(21).await, "k"), expected);
        eventually(PATIENCE, || async {
            self.health.look().await;
            self.health.healthiness().parts["outbox:sick"].cause.is_none().then_some(())
        })
        .await;
        self.running.stop().await;
    }
}

#[tokio::test]
async fn an_outbox_whose_task_panics_is_red_until_it_resumes_and_others_publish() {
    let beside = Beside::new().await;
    beside.log.panic_at("took the lease");
    sqlx::query("delete from outbox_lease").execute(beside.sick.db()).await.unwrap();
    eventually(PATIENCE, || beside.is_red()).await;
    // Between two panics as well: it does not look like a replica that stands by.
    eventually(PATIENCE, || async {
        assert!(beside.is_red().await.is_some(), "{:?}", beside.health.healthiness());
        (beside.log.panics() >= 3).then_some(())
    })
    .await;
    beside.goes_on_without_the_sick().await;
    beside.resumes().await;
}

#[tokio::test]
async fn an_outbox_whose_stream_panics_gives_its_lease_back_and_others_publish() {
    let beside = Beside::new().await;
    beside.log.panic_at("the topic is paused");
    sqlx::query(
        "insert into outbox_pause (outbox, topic, cause, reason, actor) values ('sick', $1, 'operator', 'a test', 'me')",
    )
    .bind(beside.sick.topic.name())
    .execute(beside.sick.db())
    .await
    .unwrap();
    beside.goes_on_without_the_sick().await;
    sqlx::query("delete from outbox_pause").execute(beside.sick.db()).await.unwrap();
    beside.resumes().await;
}
