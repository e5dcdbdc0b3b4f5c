//! Prints what happened, for a person to read.

use super::scenes::Played;
use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use serde_json::Value;
use std::time::Duration;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// How long a question to the broker may take.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A topic's name, and how many records it has.
pub(crate) type Counted = (String, i64);

/// The platform's topics, counted by their offsets.
pub(crate) async fn topics(brokers: &str) -> anyhow::Result<Vec<Counted>> {
    let brokers = brokers.to_owned();
    let counted = tokio::task::spawn_blocking(move || count(&brokers)).await;
    counted.context("counting the topics")?
}

fn count(brokers: &str) -> anyhow::Result<Vec<Counted>> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let metadata = consumer.fetch_metadata(None, ANSWER_MAX)?;
    let ours = metadata.topics().iter().filter(|topic| !topic.name().starts_with("__"));
    let mut counted = Vec::new();
    for topic in ours {
        let mut records = 0;
        for partition in topic.partitions() {
            let (low, high) = consumer.fetch_watermarks(topic.name(), partition.id(), ANSWER_MAX)?;
            records += high - low;
        }
        counted.push((topic.name().to_owned(), records));
    }
    counted.sort();
    Ok(counted)
}

/// Prints the topics, those for dead letters in one line when they are empty, as they must be.
pub(crate) fn print_topics(topics: &[Counted]) {
    let mut table = table(&["topic", "records"]);
    for (name, records) in topics.iter().filter(|(name, records)| !name.ends_with(".dlt") || *records > 0) {
        table.add_row([name.clone(), records.to_string()]);
    }
    let empty = topics.iter().filter(|(name, records)| name.ends_with(".dlt") && *records == 0).count();
    println!("\nTopics ({empty} more for dead letters, all empty)\n{table}");
}

/// Prints a scene: the order and its saga's timeline.
pub(crate) fn scene(played: &Played, saga: &Value) {
    let (status, total) = (played.status(), money(&played.ended["total"]));
    println!(
        "\n{}\n  order {}: {status}, {total}, in {} ms",
        played.scene.title,
        played.order,
        played.took.as_millis()
    );
    for note in &played.notes {
        println!("  {note}");
    }
    println!("{}", timeline(saga));
}

/// Minor units with two decimals: the demo sells in euros.
fn money(value: &Value) -> String {
    let cents = value["amount"].as_i64().unwrap_or_default();
    format!("{} {}", cents_text(cents), value["currency"].as_str().unwrap_or("?"))
}

/// Cents with two decimals: `349` is `3.49`.
pub(crate) fn cents_text(cents: i64) -> String {
    format!("{}{}.{:02}", if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100)
}

/// Makes an empty table with these columns.
pub(crate) fn table(columns: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(columns.iter().copied());
    table
}

/// The saga's log: the time, the step, what happened to it. Times count from its start.
fn timeline(saga: &Value) -> Table {
    let mut rows = table(&["ms", "step", "", "message"]);
    let lines = saga["timeline"].as_array().map(Vec::as_slice).unwrap_or_default();
    let start = lines.first().and_then(time_of);
    for line in lines {
        let after = time_of(line).zip(start).map(|(at, start)| (at - start).whole_milliseconds().to_string());
        let step = line["step"].as_str().unwrap_or_default();
        let message = line["command"].as_str().unwrap_or_default();
        rows.add_row([&after.unwrap_or_default(), step, &happened(line), message]);
    }
    if let Some(column) = rows.column_mut(0) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    rows
}

fn time_of(line: &Value) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(line["at"].as_str()?, &Rfc3339).ok()
}

/// What happened, in words: `undo sent (attempt 2)`, `succeeded`, `undo succeeded`.
fn happened(line: &Value) -> String {
    let what = match line["what"].as_str().unwrap_or("?") {
        "reply" => line["outcome"].as_str().unwrap_or("replied").to_owned(),
        "ignored" => format!("reply ignored: {}", line["outcome"].as_str().unwrap_or("?")),
        "ran" => "done here".to_owned(),
        what => what.to_owned(),
    };
    let undo = if line["op"] == "undo" { "undo " } else { "" };
    let again = line["attempt"].as_u64().filter(|attempt| *attempt > 1);
    let again = again.map(|attempt| format!(" (attempt {attempt})")).unwrap_or_default();
    let note = line["note"].as_str().map(|note| format!(": {note}")).unwrap_or_default();
    format!("{undo}{what}{again}{note}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_line_of_a_timeline_reads_as_a_sentence() {
        let sent = json!({ "what": "sent", "op": "undo", "attempt": 2 });
        assert_eq!(happened(&sent), "undo sent (attempt 2)");
        let reply = json!({ "what": "reply", "op": "do", "attempt": 1, "outcome": "rejected" });
        assert_eq!(happened(&reply), "rejected");
        assert_eq!(happened(&json!({ "what": "compensating", "note": "cancelled" })), "compensating: cancelled");
    }

    #[test]
    fn cents_have_two_digits_and_a_sign() {
        assert_eq!([0, 5, 349, -349].map(cents_text), ["0.00", "0.05", "3.49", "-3.49"]);
    }
}
