//! The relay's metrics: what each means, and how those are set that need no other module's types. Never an id or a key as
//! a label.

/// Describes the metrics.
pub(crate) fn describe() {
    metrics::describe_gauge!(
        "outbox_pending",
        "Committed rows that are not published yet (up to 100000 counted, then estimated; NaN: the database cannot be asked)"
    );
    metrics::describe_gauge!("outbox_oldest_pending_age_seconds", "Age of the oldest row that is not published yet");
    metrics::describe_gauge!("outbox_parked", "Parked rows, which wait for an operator");
    metrics::describe_gauge!("outbox_paused_topics", "Topics that are paused or catching up");
    metrics::describe_gauge!(
        "outbox_topic_set_apart",
        "1 while a topic is set apart, by topic and cause (operator, missing, forbidden, leaderless, refusing)"
    );
    metrics::describe_gauge!(
        "outbox_bytes_held",
        metrics::Unit::Bytes,
        "Of rows that this process has read, or reads, and that Kafka has not acknowledged yet, for all outboxes"
    );
    metrics::describe_gauge!(
        "outbox_ids_ahead",
        "Ids that are left in partitions; 0: rows go to outbox_overflow (NaN: the database cannot be asked)"
    );
    metrics::describe_gauge!("outbox_owner", "1 if this process publishes the outbox");
    metrics::describe_counter!("outbox_published_total", "Rows published, by topic");
    metrics::describe_counter!("outbox_parked_total", "Rows parked, by topic");
    metrics::describe_histogram!(
        "outbox_publish_duration_seconds",
        metrics::Unit::Seconds,
        "From a row's insert to its acknowledgement by Kafka, of the oldest row of each page"
    );
}

/// Counts a row that is parked.
pub(crate) fn parked(outbox: &str, topic: &str) {
    metrics::counter!("outbox_parked_total", "outbox" => outbox.to_owned(), "topic" => topic.to_owned()).increment(1);
}

/// Sets how many ids are left in partitions; `None`: not known.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn ids_ahead(outbox: &str, ids: Option<i64>) {
    let ids = ids.map_or(f64::NAN, |ids| ids as f64);
    metrics::gauge!("outbox_ids_ahead", "outbox" => outbox.to_owned()).set(ids);
}

/// Sets how many bytes rows take in this process.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn bytes_held(bytes: usize) {
    metrics::gauge!("outbox_bytes_held").set(bytes as f64);
}

/// Sets whether this process publishes.
pub(crate) fn owner(outbox: &str, owner: bool) {
    metrics::gauge!("outbox_owner", "outbox" => outbox.to_owned()).set(f64::from(u8::from(owner)));
}

/// Sets the gauges to unknown: this process cannot look up how far behind the outbox is.
pub(crate) fn pending_unknown(outbox: &str) {
    for gauge in ["outbox_pending", "outbox_oldest_pending_age_seconds", "outbox_parked", "outbox_paused_topics"] {
        metrics::gauge!(gauge, "outbox" => outbox.to_owned()).set(f64::NAN);
    }
}
