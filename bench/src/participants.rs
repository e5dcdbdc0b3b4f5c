//! Participants that do nothing, with the whole of the runtime around them: inbox, fence, stored reply, outbox.

use crate::contract::{Layout, apart, together};
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

/// Runs all participants, each on a database of its own, until `stop`.
pub async fn play(
    kafka: &str,
    run: &str,
    layout: Layout,
    databases: &[String],
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let participants = match layout {
        Layout::ThreeServices => vec![
            Participant::new("first").on::<apart::First>(DoNothing),
            Participant::new("second").on::<apart::Second>(DoNothing),
            Participant::new("third").on::<apart::Third>(DoNothing),
        ],
        Layout::OneService => vec![
            Participant::new("all")
                .on::<together::First>(DoNothing)
                .on::<together::Second>(DoNothing)
                .on::<together::Third>(DoNothing),
        ],
    };
    let mut consumers = Vec::new();
    for ((participant, topic), url) in participants.into_iter().zip(layout.command_topics()).zip(databases) {
        let pool = database::connect(&DatabaseSettings::from_url(url)?, "bench-participant").await?;
        let config = ConsumerConfig::new(kafka, &format!("{topic}.{run}"), [topic]);
        consumers.push(Consumer::new(config, pool, Arc::new(participant)).run(stop.clone()));
    }
    try_join_all(consumers).await?;
    Ok(())
}
