//! Topics of a run, and the number of messages in them.

use anyhow::Context as _;
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    types::RDKafkaErrorCode,
};
use std::time::Duration;

/// How long the broker may take for each request.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Creates topics; those that exist are deleted first.
pub async fn create(brokers: &str, names: &[String], partitions: i32) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let options = AdminOptions::new().operation_timeout(Some(ANSWER_MAX));
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    for deleted in admin.delete_topics(&all, &options).await? {
        match deleted {
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err((topic, code)) => anyhow::bail!("topic {topic} cannot be deleted: {code}"),
        }
    }
    let deadline = tokio::time::Instant::now() + ANSWER_MAX;
    for name in names {
        loop {
            let new = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
            match admin.create_topics([&new], &options).await?.into_iter().next() {
                // The broker takes a moment to delete a topic.
                Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Some(Err((topic, code))) => anyhow::bail!("topic {topic} cannot be created: {code}"),
                _ => break,
            }
        }
    }
    Ok(())
}

/// How many messages are in each of the topics.
pub async fn messages(brokers: &str, names: &[String]) -> anyhow::Result<Vec<i64>> {
    let (brokers, names) = (brokers.to_owned(), names.to_vec());
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &brokers).create()?;
        names.iter().map(|name| count(&consumer, name).with_context(|| format!("topic {name}"))).collect()
    })
    .await?
}

fn count(consumer: &BaseConsumer, topic: &str) -> anyhow::Result<i64> {
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_MAX)?;
    let mut sum = 0;
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let (low, high) = consumer.fetch_watermarks(topic, partition.id(), ANSWER_MAX)?;
        sum += high - low;
    }
    Ok(sum)
}

/// How many messages are in all of the topics.
pub async fn total_messages(machine: &crate::machine::Machine, names: &[String]) -> anyhow::Result<i64> {
    Ok(messages(machine.brokers(), names).await?.iter().sum())
}
