//! The spans that leave the process say no more than its log does.
//!
//! An event within a span goes along with it, its error among its attributes and as the span's status. Whatever a
//! record's headers, a provider or a server's error put there, each text is cleaned as in a log line.

use super::log_line::clean;
use opentelemetry::{Array, KeyValue, StringValue, Value, trace::Status};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SpanData, SpanExporter},
};
use std::{borrow::Cow, time::Duration};

/// Cleans each text of the spans that `E` exports.
#[derive(Debug)]
pub(super) struct CleanSpans<E>(pub(super) E);

impl<E: SpanExporter> SpanExporter for CleanSpans<E> {
    fn export(&self, mut batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        batch.iter_mut().for_each(clean_span);
        self.0.export(batch)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

fn clean_span(span: &mut SpanData) {
    clean_text(&mut span.name);
    span.attributes.iter_mut().for_each(clean_attribute);
    for event in &mut span.events.events {
        clean_text(&mut event.name);
        event.attributes.iter_mut().for_each(clean_attribute);
    }
    for link in &mut span.links.links {
        link.attributes.iter_mut().for_each(clean_attribute);
    }
    if let Status::Error { description } = &mut span.status {
        clean_text(description);
    }
}

fn clean_text(text: &mut Cow<'static, str>) {
    if let Cow::Owned(cleaned) = clean(text) {
        *text = cleaned.into();
    }
}

fn clean_value(value: &mut StringValue) {
    if let Cow::Owned(cleaned) = clean(value.as_str()) {
        *value = cleaned.into();
    }
}

fn clean_attribute(attribute: &mut KeyValue) {
    match &mut attribute.value {
        Value::String(text) => clean_value(text),
        Value::Array(Array::String(texts)) => texts.iter_mut().for_each(clean_value),
        // Numbers and truth values hold no text.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use std::{
        io,
        sync::{Arc, Mutex},
    };
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Debug, Clone, Default)]
    struct Collector(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Collector {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().extend(batch);
            Ok(())
        }
    }

    /// The one span that is exported of `work`.
    fn exported(work: impl FnOnce()) -> SpanData {
        let collector = Collector::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(CleanSpans(collector.clone())).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        // With one subscriber alone, tracing would keep the first thread's interest for all threads.
        let _another = tracing::Dispatch::new(tracing::subscriber::NoSubscriber::default());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        let spans = std::mem::take(&mut *collector.0.lock().unwrap());
        let [span] = <[SpanData; 1]>::try_from(spans).unwrap();
        span
    }

    #[test]
    fn a_span_that_is_exported_says_of_an_error_what_the_log_says() {
        let error = r#"relation "orders" does not exist at line 1721"#;
        let span = exported(|| {
            let span = tracing::info_span!("message", error, otel.name = error, late = tracing::field::Empty);
            span.record("late", error);
            span.in_scope(|| {
                tracing::warn!(%error, debug = ?io::Error::other(error), text = error, "it failed: {error}");
                // An event that is nothing but an error becomes the span's status.
                tracing::warn!(%error);
                tracing::warn!(error = &io::Error::other(error) as &dyn std::error::Error, "it failed");
            });
        });
        let said = format!("{span:?}");
        assert_eq!(span.events.len(), 3, "{said}");
        assert!(matches!(&span.status, Status::Error { description } if description.contains("does not exist")));
        for place in ["name", "error", "late", "debug", "text", "it failed", "exception.message"] {
            assert!(said.contains(place), "nothing is exported of {place}: {said}");
        }
        assert!(!said.contains("at line") && !said.contains("1721"), "{said}");
    }

    #[test]
    fn what_a_stranger_wrote_into_a_span_is_cleaned_and_cut() {
        let forged = format!("level\u{1b}[31m\0\u{202e}{}", "x".repeat(320_000));
        let span = exported(|| {
            tracing::info_span!("message", saga_type = forged).in_scope(|| tracing::info!(error = %forged, "{forged}"));
        });
        let of_events = span.events.iter().flat_map(|event| &event.attributes);
        let attributes = span.attributes.iter().chain(of_events).map(|attribute| attribute.value.as_str());
        let texts = attributes.chain(span.events.iter().map(|event| event.name.as_ref().into()));
        let texts: Vec<_> = texts.filter(|text| text.starts_with("level")).collect();
        assert!(texts.len() >= 3, "{}", texts.len());
        for text in texts {
            assert!(text.starts_with("level\u{fffd}[31m\u{fffd}\u{fffd}xx"), "{text:.40}");
            assert!(text.ends_with('…') && text.len() < 5_000, "it has an end");
        }
    }
}
