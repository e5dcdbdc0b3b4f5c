//! A participant with a step that adds to a table, and an external step, whose provider is a map by idempotency key.

use async_trait::async_trait;
use saga_core::{
    command::{Command, Done, Happened, Never, Op, Outcome},
    consumer::{Coordinates, HandleError, Message},
    envelope::{Envelope, Headers, SagaHeaders},
    id::{CommandId, MessageId, SagaId},
    outbox::Tx,
    participant::{
        CommandContext, CommandHandler, Decision, ExternalEffect, ExternalUndo, Intent, IntentConfig, Intents,
        Participant, Performed, Prepare, UndoHandler,
    },
    testkit::{Migrations, TestDatabase, deliver, unique},
    topic::Topic,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::Notify;

refinery::embed_migrations!("../migrations/messaging");

static TOPIC: Topic = Topic::events("test.commands", 1);

/// The words of `say` for a handler or the provider, one per call, the last one for ever.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Add {
    pub(crate) say: Vec<String>,
}
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Added {
    pub(crate) by_call: usize,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct No;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Remove;
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Pay {
    pub(crate) say: Vec<String>,
}
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Repay;

macro_rules! command {
    ($name:ident, $kind:literal, $reply:ty, $rejection:ty) => {
        impl Command for $name {
            const TYPE: &'static str = $kind;
            const TOPIC: &'static Topic = &TOPIC;
            type Reply = $reply;
            type Rejection = $rejection;
        }
    };
}
command!(Add, "test.add.v1", Added, No);
command!(Remove, "test.remove.v1", Done, Never);
command!(Pay, "test.pay.v1", Added, No);
command!(Repay, "test.repay.v1", Done, Never);

/// How often each command's handler was called.
#[derive(Default)]
pub(crate) struct Calls(Mutex<HashMap<CommandId, usize>>);

impl Calls {
    pub(crate) fn next(&self, id: CommandId) -> usize {
        let mut calls = self.0.lock().unwrap();
        let count = calls.entry(id).or_default();
        *count += 1;
        *count
    }

    pub(crate) fn of(&self, id: CommandId) -> usize {
        self.0.lock().unwrap().get(&id).copied().unwrap_or_default()
    }
}

fn word(say: &[String], call: usize) -> &str {
    say.get(call - 1).or(say.last()).map_or("yes", String::as_str)
}

/// The words are per message: one message may be handled twice (together with its batch, then apart).
#[derive(Default)]
pub(crate) struct AddHandler(Arc<Mutex<HashMap<CommandId, Vec<MessageId>>>>);

#[async_trait]
impl CommandHandler<Add> for AddHandler {
    async fn decide(&self, tx: &mut Tx<'_>, cx: &CommandContext, command: Add) -> anyhow::Result<Decision<Add>> {
        let call = {
            let mut seen = self.0.lock().unwrap();
            let messages = seen.entry(cx.idempotency_key()).or_default();
            if !messages.contains(&cx.message) {
                messages.push(cx.message);
            }
            messages.len()
        };
        sqlx::query("insert into effect (saga) values ($1)").bind(cx.saga.saga.0).execute(&mut **tx).await?;
        Ok(match word(&command.say, call) {
            "swallow an error" => {
                sqlx::query("select 1 / 0").execute(&mut **tx).await.ok();
                Decision::Done(Added { by_call: call })
            }
            "no" => Decision::Rejected(No),
            "later" => Decision::Failed("later".into()),
            "later, with NUL" => Decision::Failed("later\0".into()),
            _ => Decision::Done(Added { by_call: call }),
        })
    }
}

pub(crate) struct RemoveHandler(pub(crate) Arc<Calls>);

#[async_trait]
impl UndoHandler<Add, Remove> for RemoveHandler {
    async fn undo(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        _command: Remove,
        happened: Happened<Added>,
    ) -> anyhow::Result<Decision<Remove>> {
        self.0.next(cx.idempotency_key());
        assert!(matches!(happened, Happened::Yes(_)), "a local step is never in doubt");
        sqlx::query("delete from effect where saga = $1").bind(cx.saga.saga.0).execute(&mut **tx).await?;
        Ok(Decision::Done(Done {}))
    }
}

/// Another company's system: what it did, by idempotency key.
#[derive(Default)]
pub(crate) struct Provider {
    pub(crate) calls: Calls,
    pub(crate) done: Mutex<HashMap<CommandId, usize>>,
    pub(crate) voided: Mutex<Vec<CommandId>>,
    pub(crate) heard: Mutex<Vec<Happened<Added>>>,
    /// Notified when a call hangs, until it may go on.
    pub(crate) hangs: Notify,
    pub(crate) go_on: Notify,
}

impl Provider {
    /// Charges once per key, and not at all once the key was voided: then it refuses.
    fn charge(&self, key: CommandId, call: usize) -> Option<usize> {
        let voided = self.voided.lock().unwrap().contains(&key);
        (!voided).then(|| *self.done.lock().unwrap().entry(key).or_insert(call))
    }
}

struct PayEffect(Arc<Provider>);

#[async_trait]
impl ExternalEffect<Pay> for PayEffect {
    type Prepared = ();
    type Answer = Option<usize>;

    async fn prepare(&self, _: &mut Tx<'_>, _: &CommandContext, command: &Pay) -> anyhow::Result<Prepare<Pay, ()>> {
        Ok(match command.say.first().map(String::as_str) {
            Some("refuse at once") => Prepare::Decided(Decision::Rejected(No)),
            _ => Prepare::Call(()),
        })
    }

    async fn perform(&self, intent: &Intent<Pay, ()>) -> Performed<Option<usize>> {
        let key = intent.cx.idempotency_key();
        let call = self.0.calls.next(key);
        match word(&intent.command.say, call) {
            "no" => Performed::Answered(None),
            "silence" => Performed::InDoubt("no answer".into()),
            "away" => Performed::NotMade { reason: "nobody was asked".into(), again_after: Duration::from_millis(60) },
            "forbidden" => Performed::NotLetIn { reason: "the token is wrong".into() },
            "something else" => Performed::Contradiction("it did something else".into()),
            "hang" => {
                self.0.hangs.notify_one();
                self.0.go_on.notified().await;
                Performed::InDoubt("it hung".into())
            }
            "panic" => panic!("a mistake in the effect"),
            "panic with NUL" => panic!("a mistake\0in the effect"),
            "doubt with NUL" => Performed::InDoubt("no\0answer".into()),
            "arrive late" => {
                self.0.hangs.notify_one();
                self.0.go_on.notified().await;
                Performed::Answered(self.0.charge(key, call))
            }
            said => {
                let by_call = self.0.charge(key, call);
                match said {
                    "done, silence" => Performed::InDoubt("the answer was lost".into()),
                    _ => Performed::Answered(by_call),
                }
            }
        }
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<Pay, ()>,
        answer: Option<usize>,
    ) -> anyhow::Result<Decision<Pay>> {
        if intent.command.say.iter().any(|word| word == "record hangs") {
            std::future::pending::<()>().await;
        }
        let Some(by_call) = answer else { return Ok(Decision::Rejected(No)) };
        sqlx::query("insert into effect (saga) values ($1)").bind(intent.cx.saga.saga.0).execute(&mut **tx).await?;
        Ok(Decision::Done(Added { by_call }))
    }
}

struct RepayEffect(Arc<Provider>);

#[async_trait]
impl ExternalUndo<Pay, Repay> for RepayEffect {
    type Prepared = CommandId;
    type Answer = ();

    async fn prepare(
        &self,
        _: &mut Tx<'_>,
        cx: &CommandContext,
        _: &Repay,
        happened: Happened<Added>,
    ) -> anyhow::Result<Prepare<Repay, CommandId>> {
        self.0.heard.lock().unwrap().push(happened);
        Ok(Prepare::Call(cx.undoes.expect("an undo knows what it undoes")))
    }

    async fn perform(&self, intent: &Intent<Repay, CommandId>) -> Performed<()> {
        self.0.calls.next(intent.cx.idempotency_key());
        self.0.done.lock().unwrap().remove(&intent.prepared);
        self.0.voided.lock().unwrap().push(intent.prepared);
        Performed::Answered(())
    }

    async fn record(
        &self,
        tx: &mut Tx<'_>,
        intent: Intent<Repay, CommandId>,
        (): (),
    ) -> anyhow::Result<Decision<Repay>> {
        sqlx::query("delete from effect where saga = $1").bind(intent.cx.saga.saga.0).execute(&mut **tx).await?;
        Ok(Decision::Done(Done {}))
    }
}

/// A reply as it stands in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) kind: String,
    pub(crate) outcome: Outcome,
    pub(crate) payload: serde_json::Value,
}

pub(crate) struct World {
    pub(crate) database: TestDatabase,
    pub(crate) name: &'static str,
    pub(crate) participant: Arc<Participant>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) provider: Arc<Provider>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let messaging = Migrations { owner: "messaging", runner: migrations::runner() };
        let database = TestDatabase::new(&[messaging]).await;
        sqlx::query("create table effect (saga uuid not null unique)").execute(&database.pool).await.unwrap();
        let (calls, provider) = (Arc::new(Calls::default()), Arc::new(Provider::default()));
        let name = unique("participant").leak();
        let participant = Participant::new(name)
            .on::<Add>(AddHandler(Arc::default()))
            .on_undo::<Add, Remove>(RemoveHandler(calls.clone()))
            .external::<Pay>(PayEffect(provider.clone()))
            .external_undo::<Pay, Repay>(RepayEffect(provider.clone()));
        Self { database, name, participant: Arc::new(participant), calls, provider }
    }

    pub(crate) async fn try_deliver(&self, messages: &[Message]) -> Result<(), HandleError> {
        deliver(&self.database.pool, &*self.participant, messages).await
    }

    pub(crate) async fn deliver(&self, messages: &[Message]) {
        self.try_deliver(messages).await.unwrap();
    }

    /// An executor as another process has it.
    pub(crate) fn executor(&self) -> Intents {
        self.participant.intents(self.database.pool.clone()).with_config(IntentConfig {
            max_attempts: 3,
            first_delay: Duration::ZERO,
            call_timeout: Duration::from_millis(200),
            claim_margin: Duration::from_millis(100),
            poll: Duration::from_millis(20),
            ..IntentConfig::default()
        })
    }

    pub(crate) async fn replies(&self, saga: SagaId) -> Vec<Reply> {
        let rows: Vec<(String, serde_json::Value, Vec<u8>)> = sqlx::query_as(
            "select type, headers, payload from outbox where key = $1 and topic = 'replies' order by id",
        )
        .bind(saga.to_string())
        .fetch_all(&self.database.pool)
        .await
        .unwrap();
        rows.into_iter()
            .map(|(kind, headers, payload)| Reply {
                kind,
                outcome: headers["ce_outcome"].as_str().unwrap().parse().unwrap(),
                payload: serde_json::from_slice(&payload).unwrap(),
            })
            .collect()
    }

    pub(crate) async fn outcomes(&self, saga: SagaId) -> Vec<Outcome> {
        self.replies(saga).await.into_iter().map(|reply| reply.outcome).collect()
    }

    pub(crate) async fn effects(&self, saga: SagaId) -> i64 {
        sqlx::query_scalar("select count(*) from effect where saga = $1")
            .bind(saga.0)
            .fetch_one(&self.database.pool)
            .await
            .unwrap()
    }

    /// How many of this database's sessions wait for a lock of another one.
    pub(crate) async fn waiting_for_locks(&self) -> i64 {
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&self.database.pool)
        .await
        .unwrap()
    }

    /// Deletes what an asynchronous failover loses: the fence and its intent, and the rows that were written with them.
    pub(crate) async fn lose(&self, saga: SagaId) {
        for sql in [
            "delete from participant_intent where saga_id = $1",
            "delete from participant_fence where saga_id = $1",
            "delete from effect where saga = $1",
        ] {
            sqlx::query(sql).bind(saga.0).execute(&self.database.pool).await.unwrap();
        }
    }

    pub(crate) async fn intents(&self) -> i64 {
        sqlx::query_scalar("select count(*) from participant_intent").fetch_one(&self.database.pool).await.unwrap()
    }

    /// Executes until no intent is due.
    pub(crate) async fn settle(&self) {
        let executor = self.executor();
        while executor.run_once().await.unwrap() > 0 {}
    }
}

pub(crate) fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

/// An undo of an orchestrator that sends what it knows.
pub(crate) fn undo<C: Command>(saga: SagaId, happened: Happened, command: &C) -> Message {
    let mut message = message(saga, Op::Undo, command);
    if let Some(headers) = &mut message.envelope.saga {
        headers.happened = Some(happened);
        headers.undoes = Some(CommandId::derive(saga, "step", Op::Do, 0));
    }
    message
}

/// A new message with the command; called again, a resend.
pub(crate) fn message<C: Command>(saga: SagaId, op: Op, command: &C) -> Message {
    let headers = SagaHeaders {
        saga,
        definition: "test".into(),
        version: 1,
        step: "step".into(),
        op,
        occurrence: 0,
        command: CommandId::derive(saga, "step", op, 0),
        attempt: 1,
        undoes: None,
        happened: None,
        orchestrator: None,
        reply_to: Some("replies".into()),
        outcome: None,
    };
    Message {
        envelope: Envelope {
            id: MessageId::new(),
            source: "test".into(),
            kind: C::TYPE.into(),
            subject: None,
            time: None,
            sequence: None,
            content_type: None,
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            tracestate: None,
            saga: Some(headers),
            other: Headers::new(),
        },
        key: Some(saga.to_string().into_bytes()),
        payload: Some(serde_json::to_vec(command).unwrap()),
        at: Coordinates { topic: "test.commands".into(), partition: 0, offset: 0 },
    }
}
