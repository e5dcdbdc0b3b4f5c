//! What happened, for a person to read.

use super::scenes::Played;
use anyhow::Context;
use comfy_table::{Table, presets};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use serde_json::Value;
use std::time::Duration;

/// A look at the broker.
const BOUND: Duration = Duration::from_secs(10);

/// A topic and how many records it has.
pub(crate) type Counted = (String, i64);

/// The platform's topics, counted by their offsets.
pub(crate) async fn topics(brokers: &str) -> anyhow::Result<Vec<Counted>> {
    let brokers = brokers.to_owned();
    let counted = tokio::task::spawn_blocking(move || count(&brokers)).await;
    counted.context("counting the topics")?
}

fn count(brokers: &str) -> anyhow::Result<Vec<Counted>> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let metadata = consumer.fetch_metadata(None, BOUND)?;
    let ours = metadata.topics().iter().filter(|topic| !topic.name().starts_with("__"));
    let mut counted = Vec::new();
    for topic in ours {
        let mut records = 0;
        for partition in topic.partitions() {
            let (low, high) = consumer.fetch_watermarks(topic.name(), partition.id(), BOUND)?;
            records += high - low;
        }
        counted.push((topic.name().to_owned(), records));
    }
    counted.sort();
    Ok(counted)
}

/// The topics, those for dead letters in one line when they are empty, as they must be.
pub(crate) fn print_topics(topics: &[Counted]) {
    let mut table = table(&["topic", "records"]);
    for (name, records) in topics.iter().filter(|(name, records)| !name.ends_with(".dlt") || *records > 0) {
        table.add_row([name.clone(), records.to_string()]);
    }
    let empty = topics.iter().filter(|(name, records)| name.ends_with(".dlt") && *records == 0).count();
    println!("\nTopics ({empty} more for dead letters, all empty)\n{table}");
}

/// A scene: the order and its saga's timeline.
pub(crate) fn scene(played: &Played, saga: &Value) {
    let order = &played.ended;
    let status = order["status"].as_str().unwrap_or("?");
    let reason = order["reason"].as_str().map(|reason| format!(" ({reason})")).unwrap_or_default();
    println!(
        "\n{}\n  order {}: {status}{reason}, {}, in {} ms",
        played.scene.title,
        played.order,
        money(&order["total"]),
        played.took.as_millis()
    );
    println!("{}", timeline(saga));
}

/// Minor units with two decimals: the demo sells in euros.
pub(crate) fn money(value: &Value) -> String {
    let cents = value["amount"].as_i64().unwrap_or_default();
    format!("{} {}", cents_text(cents), value["currency"].as_str().unwrap_or("?"))
}

/// `349` is `3.49`.
pub(crate) fn cents_text(cents: i64) -> String {
    format!("{}{}.{:02}", if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100)
}

/// An empty table with these columns.
pub(crate) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(columns.iter().copied());
    table
}

fn timeline(saga: &Value) -> Table {
    let mut rows = table(&["time", "step", "what"]);
    for line in saga["timeline"].as_array().into_iter().flatten() {
        rows.add_row([line["at"].to_string(), line["step"].to_string(), line.to_string()]);
    }
    rows
}
