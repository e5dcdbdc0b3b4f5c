//! Three participants that do nothing, with the whole of the runtime around it: inbox, fence, stored reply, outbox.

use super::contract::{COMMANDS, First, Second, Third};
use async_trait::async_trait;
use futures::future::try_join_all;
use saga_core::{
    command::{Command, Done},
    consumer::{Consumer, ConsumerConfig},
    outbox::Tx,
    participant::{CommandContext, CommandHandler, Decision, Participant},
    service::{DatabaseSettings, database},
};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

struct DoNothing;

#[async_trait]
impl<C: Command<Reply = Done>> CommandHandler<C> for DoNothing {
    async fn decide(&self, _: &mut Tx<'_>, _: &CommandContext, _: C) -> anyhow::Result<Decision<C>> {
        Ok(Decision::Done(Done {}))
    }
}

/// All three, each on a database of its own, until `stop`.
pub async fn play(kafka: &str, run: &str, databases: &[String], stop: CancellationToken) -> anyhow::Result<()> {
    let participants = [
        Participant::new("first").on::<First>(DoNothing),
        Participant::new("second").on::<Second>(DoNothing),
        Participant::new("third").on::<Third>(DoNothing),
    ];
    let mut consumers = Vec::new();
    for ((participant, topic), url) in participants.into_iter().zip(COMMANDS).zip(databases) {
        let pool = database::connect(&DatabaseSettings::from_url(url)?, "bench-participant").await?;
        let config = ConsumerConfig::new(kafka, &format!("{}.{run}", topic.name), [topic.name]);
        consumers.push(Consumer::new(config, pool, Arc::new(participant)).run(stop.clone()));
    }
    try_join_all(consumers).await?;
    Ok(())
}
