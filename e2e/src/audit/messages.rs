//! I2 and I5: every committed message is published, nothing else is, and in order.

use super::{Expectations, Facts, Finding, Invariant, RecordFact};
use saga_core::envelope::header;
use std::collections::{BTreeMap, BTreeSet};

/// The end of a dead letter topic's name.
const DEAD_LETTERS: &str = ".dlt";

/// I2: the committed ids of every outbox are the ids in the topics, and those parked or discarded.
pub fn outboxes_and_topics_agree(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let finding = |what: String| Finding::new(Invariant::I2, what);
    let mut findings = Vec::new();
    let mut published: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for (name, id) in dead_letters(facts) {
        published.entry(name).or_default().insert(id);
    }
    for record in ours(facts, expected) {
        let at = record.coordinates();
        let sequence = record.header(header::SEQUENCE).and_then(|text| text.parse::<i64>().ok());
        let (Some(source), Some(sequence)) = (record.header(header::SOURCE), sequence) else {
            findings.push(finding(format!("{at} does not say which outbox row it is")));
            continue;
        };
        let Some(row) = facts.databases.get(source).and_then(|database| database.outbox.get(&sequence)) else {
            findings.push(finding(format!("{at} is row {sequence} of {source}, which was never committed")));
            continue;
        };
        published.entry(source).or_default().insert(sequence);
        let same_id = record.header(header::ID) == Some(row.message.to_string().as_str());
        let same_kind = record.header(header::TYPE) == Some(row.kind.as_str());
        if !(same_id && same_kind && record.topic == row.topic && record.key == row.key && record.value == row.payload)
        {
            findings.push(finding(format!("{at} is not what row {sequence} of {source} says")));
        }
    }
    for (name, database) in &facts.databases {
        let none = BTreeSet::new();
        let published = published.get(name.as_str()).unwrap_or(&none);
        for (id, row) in &database.outbox {
            let parked = database.parked.get(id).is_some_and(|status| status != "published");
            if !parked && !published.contains(id) {
                findings.push(finding(format!("row {id} of {name} ({} to {}) is in no topic", row.kind, row.topic)));
            }
        }
    }
    findings
}

/// I5: of each topic and key, first occurrences are in the order of their outbox, and a key stays in its partition.
pub fn first_occurrences_are_in_order(facts: &Facts, expected: &Expectations) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut last: BTreeMap<(&str, &str, &str), (i64, i32)> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for record in ours(facts, expected) {
        let (Some(key), Some(source), Some(id)) =
            (record.key.as_deref(), record.header(header::SOURCE), record.header(header::ID))
        else {
            continue;
        };
        let Some(sequence) = record.header(header::SEQUENCE).and_then(|text| text.parse::<i64>().ok()) else {
            continue;
        };
        if !seen.insert((source, id)) {
            continue;
        }
        let before = last.insert((&record.topic, key, source), (sequence, record.partition));
        let Some((before, partition)) = before else { continue };
        if before > sequence {
            let what = format!("{}: {sequence} comes after {before} of the same key {key}", record.coordinates());
            findings.push(Finding::new(Invariant::I5, what));
        }
        if partition != record.partition {
            let what = format!("{}: key {key} was in partition {partition} before", record.coordinates());
            findings.push(Finding::new(Invariant::I5, what));
        }
    }
    findings
}

/// The outbox rows of dead letters. A dead letter keeps the source of the record that it is a copy of, so its row is
/// known by its topic and id.
fn dead_letters(facts: &Facts) -> Vec<(&str, i64)> {
    let records = facts.records.iter().filter(|record| record.topic.ends_with(DEAD_LETTERS));
    let ids: BTreeSet<_> = records.filter_map(|r| Some((r.topic.as_str(), r.header(header::ID)?.to_owned()))).collect();
    let rows = facts.databases.iter().flat_map(|(name, database)| database.outbox.iter().map(move |row| (name, row)));
    let dead = rows.filter(|(_, (_, row))| ids.contains(&(row.topic.as_str(), row.message.to_string())));
    dead.map(|(name, (id, _))| (name.as_str(), *id)).collect()
}

/// The records that the platform wrote, without dead letters.
fn ours<'a>(facts: &'a Facts, expected: &'a Expectations) -> impl Iterator<Item = &'a RecordFact> {
    facts.records.iter().filter(|record| {
        let source = record.header(header::SOURCE);
        !record.topic.ends_with(DEAD_LETTERS) && source.is_none_or(|source| !expected.foreign_sources.contains(source))
    })
}
