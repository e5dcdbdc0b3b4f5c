//! Orchestrators and definitions that call their sagas and steps the same share no fence. Builds beside them know of no
//! namespaces.

use crate::support::{Add, Pay, Remove, Repay, World, message, words};
use saga_core::{
    command::Outcome::*,
    command::{Command, Happened, Op, Outcome},
    consumer::{HandleError, Message},
    envelope::SagaHeaders,
    id::{CommandId, MessageId, SagaId},
};

/// An orchestrator and a definition of its own, whose command ids are a secret of its saga.
#[derive(Clone, Copy)]
struct Namespace {
    reply_to: &'static str,
    definition: &'static str,
    ids: [CommandId; 2],
}

impl Namespace {
    fn new(reply_to: &'static str, definition: &'static str) -> Self {
        Self { reply_to, definition, ids: std::array::from_fn(|_| CommandId(uuid::Uuid::new_v4())) }
    }

    /// A namespace of the build before, whose ids follow from public facts.
    fn old(reply_to: &'static str, definition: &'static str, saga: SagaId) -> Self {
        Self { reply_to, definition, ids: [Op::Do, Op::Undo].map(|op| CommandId::derive(saga, "step", op, 0)) }
    }

    fn message<C: Command>(self, saga: SagaId, op: Op, command: &C) -> Message {
        let mut message = message(saga, op, command);
        let headers = message.envelope.saga.as_mut().unwrap();
        let [run, undo] = self.ids;
        *headers = SagaHeaders {
            definition: self.definition.into(),
            reply_to: Some(self.reply_to.into()),
            command: if op == Op::Do { run } else { undo },
            undoes: (op == Op::Undo).then_some(run),
            happened: (op == Op::Undo).then_some(Happened::InDoubt),
            ..headers.clone()
        };
        message
    }

    async fn outcomes(self, world: &World, saga: SagaId) -> Vec<Outcome> {
        let outcomes: Vec<String> = sqlx::query_scalar(
            "select headers ->> 'ce_outcome' from outbox
              where key = $1 and topic = $2 and headers ->> 'ce_sagatype' = $3 and headers ->> 'ce_sagastep' = 'step'
              order by id",
        )
        .bind(saga.to_string())
        .bind(self.reply_to)
        .bind(self.definition)
        .fetch_all(&world.database.pool)
        .await
        .unwrap();
        outcomes.iter().map(|outcome| outcome.parse().unwrap()).collect()
    }
}

fn yes<C: for<'a> From<&'a [String]>>() -> C {
    C::from(&words(&["yes"]))
}

impl From<&[String]> for Add {
    fn from(say: &[String]) -> Self {
        Self { say: say.to_vec() }
    }
}

impl From<&[String]> for Pay {
    fn from(say: &[String]) -> Self {
        Self { say: say.to_vec() }
    }
}

/// The rows, with their step's name and their namespace.
async fn rows(world: &World, saga: SagaId) -> Vec<(String, String, String)> {
    sqlx::query_as(
        "select step, definition, orchestrator from participant_fence where saga_id = $1 order by step, definition",
    )
    .bind(saga.0)
    .fetch_all(&world.database.pool)
    .await
    .unwrap()
}

/// Turns the rows into those of a build that knows no namespaces.
async fn as_an_old_build_writes(world: &World) {
    sqlx::query("update participant_fence set orchestrator = default, definition = default")
        .execute(&world.database.pool)
        .await
        .unwrap();
}

#[tokio::test]
async fn two_definitions_of_one_or_of_two_services_share_no_fence() {
    let saga = SagaId::new;
    for together in [true, false] {
        for old in [true, false] {
            for (topic, definition) in [("replies", "refund"), ("other.replies", "order")] {
                let (world, saga) = (World::new().await, saga());
                let of = |topic, definition| match old {
                    true => Namespace::old(topic, definition, saga),
                    false => Namespace::new(topic, definition),
                };
                let (one, other) = (of("replies", "order"), of(topic, definition));
                // The second is even of another type: it was answered with the first's reply, and never executed.
                let messages = [one.message(saga, Op::Do, &yes::<Add>()), other.message(saga, Op::Do, &yes::<Pay>())];
                if together {
                    world.deliver(&messages).await;
                } else {
                    for message in messages {
                        world.deliver(&[message]).await;
                    }
                }
                assert_eq!(one.outcomes(&world, saga).await, [Succeeded]);
                assert_eq!(other.outcomes(&world, saga).await, []);
                assert_eq!(world.effects(saga).await, 1);
                assert_eq!(world.intents().await, 1, "the second is being called");
                // The first that came has the row where an old build looks, too; of one batch it is any.
                let rows = rows(&world, saga).await;
                let plain = usize::from(rows[0].1 == "order" && rows[0].2 == "replies");
                assert!(rows[0].0 == "step" && (together || plain == 1), "{rows:?}");
                assert_eq!(rows[1].0, format!("step [{} of {}]", rows[1].1, rows[1].2));

                // A resend of each is answered from its own fence, and an undo undoes its own alone.
                world.deliver(&[one.message(saga, Op::Undo, &Remove), one.message(saga, Op::Do, &yes::<Add>())]).await;
                assert_eq!(one.outcomes(&world, saga).await, [Succeeded, Succeeded, Succeeded]);
                assert_eq!((world.effects(saga).await, world.intents().await), (0, 1));
                world.settle().await;
                assert_eq!(other.outcomes(&world, saga).await, [Succeeded]);
                assert_eq!(world.effects(saga).await, 1);
                world.deliver(&[other.message(saga, Op::Undo, &Repay)]).await;
                world.settle().await;
                assert_eq!(other.outcomes(&world, saga).await, [Succeeded, Succeeded]);
                assert_eq!(*world.provider.voided.lock().unwrap(), [other.ids[0]]);
                assert_eq!(world.effects(saga).await, 0);
            }
        }
    }
}

#[tokio::test]
async fn a_fence_of_a_build_without_namespaces_is_its_commands_own() {
    for old_ids in [true, false] {
        let (world, saga) = (World::new().await, SagaId::new());
        let one = if old_ids { Namespace::old("replies", "order", saga) } else { Namespace::new("replies", "order") };
        world.deliver(&[one.message(saga, Op::Do, &yes::<Add>())]).await;
        as_an_old_build_writes(&world).await;
        // A resend is answered again, and the row is taken over.
        world.deliver(&[one.message(saga, Op::Do, &yes::<Add>())]).await;
        assert_eq!(rows(&world, saga).await, [("step".into(), "order".into(), "replies".into())]);
        as_an_old_build_writes(&world).await;
        world.deliver(&[one.message(saga, Op::Undo, &Remove)]).await;
        as_an_old_build_writes(&world).await;
        world.deliver(&[one.message(saga, Op::Undo, &Remove), one.message(saga, Op::Do, &yes::<Add>())]).await;
        assert_eq!(one.outcomes(&world, saga).await, [Succeeded; 5]);
        assert_eq!((world.effects(saga).await, rows(&world, saga).await.len()), (0, 1));
    }
}

#[tokio::test]
async fn a_fence_of_a_build_without_namespaces_is_not_taken_by_another_definition() {
    let (world, saga) = (World::new().await, SagaId::new());
    let (one, other) = (Namespace::new("replies", "order"), Namespace::new("replies", "refund"));
    world.deliver(&[one.message(saga, Op::Do, &yes::<Add>())]).await;
    as_an_old_build_writes(&world).await;
    world.deliver(&[other.message(saga, Op::Undo, &Remove)]).await;
    assert_eq!(other.outcomes(&world, saga).await, [Succeeded], "there is nothing of its own to undo");
    assert_eq!(world.effects(saga).await, 1, "and the other's effect stays");
    world.deliver(&[one.message(saga, Op::Undo, &Remove), other.message(saga, Op::Do, &yes::<Add>())]).await;
    assert_eq!(one.outcomes(&world, saga).await, [Succeeded, Succeeded]);
    assert_eq!(other.outcomes(&world, saga).await, [Succeeded, Rejected]);
    assert_eq!(world.effects(saga).await, 0);
}

#[tokio::test]
async fn a_fence_stays_its_own_when_the_one_in_the_plain_place_is_gone() {
    let (world, saga) = (World::new().await, SagaId::new());
    let (one, other) = (Namespace::new("replies", "order"), Namespace::new("replies", "refund"));
    world.deliver(&[other.message(saga, Op::Do, &Pay { say: words(&["no"]) })]).await;
    world.deliver(&[one.message(saga, Op::Do, &yes::<Pay>())]).await;
    world.settle().await;
    sqlx::query("delete from participant_fence where step = 'step'").execute(&world.database.pool).await.unwrap();
    world.deliver(&[one.message(saga, Op::Do, &yes::<Pay>())]).await;
    assert_eq!(one.outcomes(&world, saga).await, [Succeeded, Succeeded]);
    assert_eq!(rows(&world, saga).await.len(), 1);
    assert_eq!(world.provider.calls.of(one.ids[0]), 1);
}

#[tokio::test]
async fn an_orchestrator_whose_reply_topic_was_changed_finds_its_fences_again() {
    let (world, saga) = (World::new().await, SagaId::new());
    let before = Namespace::new("replies", "order");
    let after = Namespace { reply_to: "replies.v2", ..before };
    world.deliver(&[before.message(saga, Op::Do, &yes::<Pay>())]).await;
    let named = |mut message: Message| {
        message.envelope.saga.as_mut().unwrap().orchestrator = Some("replies".into());
        message.envelope.id = MessageId::new();
        message
    };
    world.settle().await;
    world.deliver(&[named(after.message(saga, Op::Do, &yes::<Pay>()))]).await;
    world.deliver(&[named(after.message(saga, Op::Undo, &Repay))]).await;
    world.settle().await;
    assert_eq!(after.outcomes(&world, saga).await, [Succeeded, Succeeded]);
    assert_eq!((world.provider.calls.of(before.ids[0]), rows(&world, saga).await.len()), (1, 1));
    let headers: serde_json::Value = sqlx::query_scalar("select headers from outbox order by id desc limit 1")
        .fetch_one(&world.database.pool)
        .await
        .unwrap();
    assert!(headers.get("ce_sagaorchestrator").is_none(), "a reply needs no namespace");
}

#[tokio::test]
async fn a_reply_topic_that_is_renamed_loses_no_fence_of_an_old_saga_in_silence() {
    for undo in [true, false] {
        let (world, saga) = (World::new().await, SagaId::new());
        let before = Namespace::old("replies", "order", saga);
        let after = Namespace { reply_to: "replies.v2", ..before };
        world.deliver(&[before.message(saga, Op::Do, &yes::<Add>())]).await;
        for attempt in 2..4 {
            let mut again = match undo {
                true => after.message(saga, Op::Undo, &Remove),
                false => after.message(saga, Op::Do, &yes::<Add>()),
            };
            again.envelope.saga.as_mut().unwrap().attempt = attempt;
            world.deliver(&[again]).await;
        }
        // It is not known whose record that is: it is neither taken nor passed over.
        assert_eq!(after.outcomes(&world, saga).await, [Failed, Failed]);
        assert_eq!(world.effects(saga).await, 1, "it is not done twice, nor called undone while it is there");
        world.deliver(&[before.message(saga, Op::Undo, &Remove)]).await;
        assert_eq!(before.outcomes(&world, saga).await, [Succeeded, Succeeded], "under its former name all is well");
        assert_eq!(world.effects(saga).await, 0);
    }
}

#[tokio::test]
async fn a_fence_that_two_partitions_make_apart_at_once_is_no_fault_of_a_record() {
    let (world, saga) = (World::new().await, SagaId::new());
    let (one, other) = (Namespace::new("replies", "order"), Namespace::new("replies", "refund"));
    world.deliver(&[one.message(saga, Op::Do, &yes::<Add>())]).await;
    let handle = async |tx: &mut saga_core::outbox::Tx<'_>| {
        let undo = other.message(saga, Op::Undo, &Remove);
        saga_core::consumer::Handler::handle(&*world.participant, tx, &[undo]).await
    };
    let mut first = world.database.pool.begin().await.unwrap();
    handle(&mut first).await.unwrap();
    let mut second = world.database.pool.begin().await.unwrap();
    let second = async {
        handle(&mut second).await.unwrap();
        second.commit().await.unwrap();
    };
    let first = async {
        saga_core::testkit::eventually(std::time::Duration::from_secs(20), async || {
            (world.waiting_for_locks().await > 0).then_some(())
        })
        .await;
        first.commit().await.unwrap();
    };
    tokio::join!(second, first);
    assert_eq!(other.outcomes(&world, saga).await, [Succeeded, Succeeded], "the second is answered from the first's");
    assert_eq!((world.effects(saga).await, rows(&world, saga).await.len()), (1, 2));
}

#[tokio::test]
async fn a_namespace_with_a_name_that_cannot_be_stored_is_poison() {
    let world = World::new().await;
    for name in ["x".repeat(10_000), "a\0b".into()] {
        let mut message = Namespace::new("replies", "order").message(SagaId::new(), Op::Do, &yes::<Add>());
        message.envelope.saga.as_mut().unwrap().orchestrator = Some(name);
        let answer = world.try_deliver(&[message]).await;
        assert!(matches!(answer, Err(HandleError::Poison(_))), "{answer:?}");
    }
    // The longest names that are allowed fit into the key.
    let longest: &'static str = "n".repeat(512).leak();
    let (saga, step) = (SagaId::new(), "s".repeat(512));
    let topic: &'static str = "n".repeat(249).leak();
    for (orchestrator, reply_to) in [(None, "replies"), (Some(longest), topic)] {
        let mut message = Namespace::new(reply_to, longest).message(saga, Op::Do, &yes::<Pay>());
        let headers = message.envelope.saga.as_mut().unwrap();
        headers.step.clone_from(&step);
        headers.orchestrator = orchestrator.map(ToOwned::to_owned);
        world.deliver(&[message]).await;
    }
    assert_eq!((rows(&world, saga).await.len(), world.intents().await), (2, 2));
    let executor = world.executor();
    assert_eq!(executor.run_once().await.unwrap(), 2, "their intents are read again");
}
