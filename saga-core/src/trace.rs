//! W3C trace context across processes: HTTP -> outbox -> Kafka -> consumer.
//!
//! The context is stored with the outbox row and travels in the record's headers; the consumer that handles the record
//! continues it. Without a tracing layer that knows OpenTelemetry nothing is written and nothing is read.
//!
//! ```
//! use saga_core::{envelope::Headers, trace};
//!
//! let mut headers = Headers::new();
//! trace::inject_current(&mut headers);
//! assert!(headers.is_empty(), "no tracing layer knows OpenTelemetry here");
//! ```

pub use crate::envelope::carried;

use crate::envelope::{Envelope, Headers, header};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TraceContextExt,
};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use std::borrow::Cow;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Writes the current span's context into `headers`, and its trace id as `correlation-id` unless there is one.
pub fn inject_current(headers: &mut Headers) {
    let context = Span::current().context();
    let span = context.span().span_context().clone();
    if !span.is_valid() {
        return;
    }
    TraceContextPropagator::new().inject_context(&context, &mut Writer(headers));
    headers.entry(header::CORRELATION_ID.into()).or_insert_with(|| span.trace_id().to_string());
}

/// The context that a message came with; `None` when it has none that is valid.
pub fn context_of(envelope: &Envelope) -> Option<Context> {
    envelope.traceparent.as_ref()?;
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &Reader(envelope));
    context.span().span_context().is_valid().then_some(context)
}

/// Makes `span` continue the trace that a message came with. Must be called before the span is entered.
pub fn continue_from(span: &Span, envelope: &Envelope) {
    if let Some(context) = context_of(envelope) {
        // The error means that there is no OpenTelemetry layer or that it filters this span: nothing to continue.
        span.set_parent(context).ok();
    }
}

/// Ties `span` to the trace that a message came with, for work done for many messages at once.
pub fn link_to(span: &Span, envelope: &Envelope) {
    if let Some(context) = context_of(envelope) {
        span.add_link(context.span().span_context().clone());
    }
}

struct Writer<'a>(&'a mut Headers);

impl Injector for Writer<'_> {
    fn set(&mut self, key: &str, value: String) {
        // An empty tracestate is what most traces have; it is left out.
        if carried(key, &value).is_some() {
            let name = [header::TRACEPARENT, header::TRACESTATE].into_iter().find(|name| *name == key);
            self.0.insert(name.map_or_else(|| key.to_owned().into(), Cow::Borrowed), value);
        }
    }
}

struct Reader<'a>(&'a Envelope);

impl Extractor for Reader<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            header::TRACEPARENT => self.0.traceparent.as_deref(),
            header::TRACESTATE => self.0.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec![header::TRACEPARENT, header::TRACESTATE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{id::MessageId, outbox::NewMessage};
    use opentelemetry::trace::TracerProvider;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn a_trace_goes_through_the_headers_of_a_message() {
        let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
        let subscriber = tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
        tracing::subscriber::with_default(subscriber, || {
            let mut headers = Headers::new();
            tracing::info_span!("request").in_scope(|| inject_current(&mut headers));
            let mut envelope = Envelope::new(MessageId::new(), "orders", "orders.placed.v1");
            envelope.traceparent = Some(headers[header::TRACEPARENT].clone());

            let consuming = tracing::info_span!("consume");
            continue_from(&consuming, &envelope);
            let mut further = Headers::new();
            consuming.in_scope(|| inject_current(&mut further));

            assert_eq!(headers[header::CORRELATION_ID], further[header::CORRELATION_ID]);
            assert_ne!(headers[header::TRACEPARENT], further[header::TRACEPARENT]);
        });
    }

    #[test]
    fn what_a_message_of_a_batch_causes_is_of_that_messages_trace_and_not_of_the_batchs() {
        let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
        let subscriber = tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
        tracing::subscriber::with_default(subscriber, || {
            let mut cause = Envelope::new(MessageId::new(), "payments", "payments.authorize.v1.reply");
            cause.traceparent = Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into());
            let traceparent = |span: Span| {
                let caused = span.in_scope(|| NewMessage::tombstone("topic", "key", "type.v1").caused_by(&cause));
                caused.headers[header::TRACEPARENT].clone()
            };
            assert_eq!(Some(traceparent(tracing::info_span!("batch"))), cause.traceparent);
            let message = tracing::info_span!("message");
            continue_from(&message, &cause);
            let ours = traceparent(message);
            assert!(ours.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{ours}");
            assert_ne!(Some(ours), cause.traceparent, "it is our span's");
        });
    }

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_strangers_endless_tracestate_is_left_out_of_what_its_message_causes() {
        let bytes = [TRACE.to_owned(), format!("a={}", "x".repeat(320_000)), "user=ada".to_owned()];
        let id = MessageId::new().to_string();
        let [parent, state, baggage] = &bytes;
        let cause = Envelope::decode(
            [
                ("ce_specversion", "1.0"),
                ("ce_id", &id),
                ("ce_source", "s"),
                ("ce_type", "t.v1"),
                ("traceparent", parent),
                ("tracestate", state),
                ("baggage", baggage),
                ("correlation-id", state),
            ]
            .map(|(name, value)| (name, Some(value.as_bytes()))),
        )
        .unwrap();
        assert_eq!((cause.traceparent.as_deref(), cause.tracestate.as_deref()), (Some(TRACE), None));
        let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
        let subscriber = tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
        tracing::subscriber::with_default(subscriber, || {
            let handling = tracing::info_span!("message");
            continue_from(&handling, &cause);
            let within = handling.in_scope(|| NewMessage::tombstone("topic", "key", "type.v1").caused_by(&cause));
            let beside = NewMessage::tombstone("topic", "key", "type.v1").caused_by(&cause);
            for caused in [within, beside] {
                let length: usize = caused.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
                assert!(length < 200, "{length}");
                assert!(caused.headers[header::TRACEPARENT].contains("4bf92f3577b34da6a3ce929d0e0e4736"));
                assert!(!caused.headers.contains_key(header::TRACESTATE) && !caused.headers.contains_key("baggage"));
            }
        });
    }

    #[test]
    fn garbage_in_a_traceparent_is_no_context() {
        let mut envelope = Envelope::new(MessageId::new(), "orders", "orders.placed.v1");
        envelope.traceparent = Some("00-garbage".into());
        assert!(context_of(&envelope).is_none());
    }
}
