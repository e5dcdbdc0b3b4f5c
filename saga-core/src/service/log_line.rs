//! One JSON object per log event.
//!
//! Every line carries `service`, `trace_id`, and the fields of all spans it happened in (an inner span wins), at the
//! top level. So `saga`, `message_id`, `request_id` are found by their name, wherever they were set. A saga's id is
//! there under its type's name too, if this process has declared the type ([`name_sagas`]): of an `order` saga, `order`
//! is found.
//!
//! The names of fields come from the program alone. A value may come from anywhere (a record's headers, a provider, an
//! error of a broker), so each text is cleaned and has an end.

use crate::reason::{may_name_a_place, without_places};
use opentelemetry::trace::TraceContextExt;
use serde_json::{Map, Value};
use std::{
    borrow::Cow,
    collections::BTreeSet,
    fmt,
    io::Write,
    sync::{OnceLock, PoisonError, RwLock},
};
use tracing::{
    Dispatch, Event, Subscriber,
    dispatcher::WeakDispatch,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    Layer,
    field::MakeExt,
    fmt::{
        FormatFields,
        format::{self, Writer},
    },
    layer::Context,
    registry::LookupSpan,
};

/// The longest text in a line, in characters: a reason has a thousand, and an error may hold several.
const TEXT_MAX: usize = 4_000;

/// The types of sagas whose ids are found under the type's name.
static SAGAS: RwLock<BTreeSet<String>> = RwLock::new(BTreeSet::new());

/// Has the ids of sagas of these types found under the type's name. A record's own name for its saga does not become
/// such a name: forged records would give the fields of our logs their names.
pub fn name_sagas<'a>(types: impl IntoIterator<Item = &'a str>) {
    SAGAS.write().unwrap_or_else(PoisonError::into_inner).extend(types.into_iter().map(str::to_owned));
}

fn is_declared(saga_type: &str) -> bool {
    SAGAS.read().unwrap_or_else(PoisonError::into_inner).contains(saga_type)
}

/// `text` with an end, without places in source code, and without characters that a terminal or a reader of lines takes
/// for more than text. Line breaks and tabs stay.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    let strange = |c: char| {
        // Separators of lines and paragraphs, and characters that turn the direction of writing.
        let formats = matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        formats || c.is_control() && !matches!(c, '\n' | '\t')
    };
    let cut = text.char_indices().nth(TEXT_MAX).map(|(at, _)| at);
    if cut.is_none() && !text.chars().any(strange) && !may_name_a_place(text) {
        return Cow::Borrowed(text);
    }
    let kept = without_places(&text[..cut.unwrap_or(text.len())]);
    let mut clean: String = kept.chars().map(|c| if strange(c) { '\u{fffd}' } else { c }).collect();
    if cut.is_some() {
        clean.push('…');
    }
    Cow::Owned(clean)
}

/// Formats fields for people, cleaned with [`clean`]. An event stays on its line.
pub(crate) fn cleaned() -> impl for<'w> FormatFields<'w> + Send + Sync + 'static {
    let one = |writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| {
        let value = format!("{value:?}");
        let value = clean(&value).replace('\n', "\\n");
        match field.name() {
            "message" => write!(writer, "{value}"),
            name => write!(writer, "{}={value}", name.trim_start_matches("r#")),
        }
    };
    format::debug_fn(one).delimited(" ")
}

/// Writes events as lines of JSON to `make_writer`'s writers.
pub(crate) struct JsonLines<F> {
    service: &'static str,
    writer: F,
    dispatch: OnceLock<WeakDispatch>,
}

/// The fields of an event, or of a span, beside which they are kept. Nearly no span is ever written to the log, but
/// each message has one: so this is as small as can be.
#[derive(Default)]
struct Fields(Vec<(&'static str, Value)>);

impl<F> JsonLines<F> {
    pub(crate) fn new(service: &'static str, writer: F) -> Self {
        Self { service, writer, dispatch: OnceLock::new() }
    }
}

impl<S, F, W> Layer<S> for JsonLines<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Fn() -> W + 'static,
    W: Write,
{
    fn on_register_dispatch(&self, dispatch: &Dispatch) {
        // A second registration would be a second subscriber over the same layer: the first stays.
        let _ = self.dispatch.set(dispatch.downgrade());
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields(Vec::with_capacity(attributes.fields().len()));
        attributes.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(fields) = span.extensions_mut().get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = Map::new();
        let metadata = event.metadata();
        let now = crate::clock::host().format(&time::format_description::well_known::Rfc3339);
        line.insert("timestamp".into(), now.unwrap_or_default().into());
        line.insert("level".into(), metadata.level().as_str().into());
        line.insert("service".into(), self.service.into());
        line.insert("target".into(), metadata.target().into());
        line.insert("message".into(), Value::Null);
        line.insert("trace_id".into(), self.trace_id(event, &context).into());
        for span in context.event_scope(event).into_iter().flat_map(tracing_subscriber::registry::Scope::from_root) {
            if let Some(Fields(fields)) = span.extensions().get() {
                for (name, value) in fields {
                    line.insert(free_name(name), value.clone());
                }
            }
        }
        let mut own = Fields::default();
        event.record(&mut own);
        for (name, value) in own.0 {
            let name = if name == "message" { name.to_owned() } else { free_name(name) };
            line.insert(name, value);
        }
        if let (Some(saga), Some(Value::String(kind))) = (line.get("saga").cloned(), line.get("saga_type"))
            && is_declared(kind)
        {
            let name = free_name(kind);
            line.entry(name).or_insert(saga);
        }

        let mut text = Value::Object(line).to_string();
        text.push('\n');
        // A log that cannot be written has nowhere to say so.
        let _ = (self.writer)().write_all(text.as_bytes());
    }
}

impl<F> JsonLines<F> {
    /// The id of the trace; empty outside of any span.
    fn trace_id<S>(&self, event: &Event<'_>, context: &Context<'_, S>) -> String
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let span = context.event_span(event).map(|span| span.id());
        let dispatch = self.dispatch.get().and_then(WeakDispatch::upgrade);
        let found =
            span.zip(dispatch).and_then(|(id, dispatch)| tracing_opentelemetry::get_otel_context(&id, &dispatch));
        match found {
            Some(found) if found.span().span_context().is_valid() => found.span().span_context().trace_id().to_string(),
            _ => String::new(),
        }
    }
}

/// Renames a field that would overwrite one that every line has.
fn free_name(name: &str) -> String {
    match name {
        "timestamp" | "level" | "service" | "target" | "message" | "trace_id" => format!("field_{name}"),
        _ => name.to_owned(),
    }
}

impl Fields {
    /// Sets a field; of two values the later counts.
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        match self.0.iter_mut().find(|(name, _)| *name == field.name()) {
            Some((_, known)) => *known = value.into(),
            None => self.0.push((field.name(), value.into())),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, clean(&format!("{value:?}")));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, clean(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider;
    use std::{
        io,
        sync::{Arc, Mutex},
    };
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that are logged while `work` runs.
    fn logged(work: impl FnOnce()) -> Vec<Value> {
        let lines = Lines::default();
        let writer = lines.clone();
        let tracer = opentelemetry_sdk::trace::SdkTracerProvider::builder().build().tracer("test");
        let subscriber = tracing_subscriber::registry()
            .with(tracing_opentelemetry::layer().with_tracer(tracer))
            .with(JsonLines::new("me", move || writer.clone()));
        tracing::subscriber::with_default(subscriber, work);
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The text for people that is logged while `work` runs.
    fn for_people(work: impl FnOnce()) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).without_time().with_target(false);
        let layer = layer.fmt_fields(cleaned()).with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work);
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn the_id_of_a_saga_is_found_under_its_declared_types_name() {
        name_sagas(["order", "level"]);
        let lines = logged(|| {
            tracing::info!(saga = "s1", saga_type = "order", "one");
            tracing::info!(saga = "s1", saga_type = "order", order = "o1", "two");
            tracing::info!(saga = "s1", saga_type = "level", "three");
        });
        assert_eq!((&lines[0]["order"], &lines[1]["order"]), (&"s1".into(), &"o1".into()));
        assert_eq!((&lines[2]["level"], &lines[2]["field_level"]), (&"INFO".into(), &"s1".into()));
    }

    #[test]
    fn what_a_forged_record_says_names_no_field_and_is_cleaned_and_cut() {
        let forged = format!("level\r\n\u{1b}[31m\0\u{9b}\u{202e}{}", "x".repeat(320_000));
        let lines = logged(|| {
            tracing::info_span!("message", saga = "s1", saga_type = forged).in_scope(|| tracing::info!("one"));
            tracing::info!(saga = "s1", saga_type = "sadmin", error = %forged, "{forged}");
        });
        let names = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let every = ["level", "message", "saga", "saga_type", "service", "target", "timestamp", "trace_id"];
        assert_eq!(names(&lines[0]), every);
        assert!(!names(&lines[1]).contains(&"sadmin".to_owned()));
        for text in [&lines[0]["saga_type"], &lines[1]["error"], &lines[1]["message"]] {
            let text = text.as_str().unwrap();
            assert!(text.starts_with("level\u{fffd}\n\u{fffd}[31m\u{fffd}\u{fffd}\u{fffd}xx"), "{text:.40}");
            assert_eq!(text.chars().count(), TEXT_MAX + 1, "and a sign that it was cut");
        }
    }

    #[test]
    fn no_line_of_a_servers_source_is_logged_however_its_error_is() {
        let error = r#"relation "orders" does not exist at line 1721"#;
        let log = || {
            tracing::info_span!("message", inner = %error, outer = error).in_scope(|| {
                tracing::warn!(%error, debug = ?io::Error::other(error), text = error, "it failed: {error}");
            });
        };
        let [line] = &logged(log)[..] else { panic!("it is one line") };
        let people = for_people(log);
        for said in [line.to_string(), people] {
            assert!(said.contains("does not exist") && !said.contains("at line"), "{said}");
        }
    }

    #[test]
    fn for_people_an_event_stays_on_its_line_whatever_its_values_hold() {
        let text = for_people(|| {
            let forged = "a\n2026-01-01 INFO all is well\u{1b}[2J\u{85}";
            tracing::info_span!("message", kind = %forged)
                .in_scope(|| tracing::warn!(error = %forged, n = 1, "{forged}"));
        });
        let clean = "a\\n2026-01-01 INFO all is well\u{fffd}[2J\u{fffd}";
        assert_eq!(text, format!(" WARN message{{kind={clean}}}: {clean} error={clean} n=1\n"));
    }

    #[test]
    fn a_line_carries_the_service_the_trace_and_the_fields_of_every_span_around_it() {
        let lines = logged(|| {
            let outer = tracing::info_span!("http", request_id = "r1", saga = "outer", status = tracing::field::Empty);
            outer.in_scope(|| {
                tracing::info_span!("message", saga = "s1", order = %7).in_scope(|| {
                    tracing::warn!(attempt = 2, "tried \"again\"");
                });
                outer.record("status", 503);
                outer.record("status", 202);
                tracing::info!("done");
            });
            tracing::info!("outside");
        });
        let [within, done, outside] = lines.as_slice() else { panic!("{lines:?}") };
        assert_eq!((&within["service"], &within["level"]), (&"me".into(), &"WARN".into()));
        assert_eq!(within["message"], "tried \"again\"");
        assert_eq!(
            (&within["saga"], &within["order"], &within["request_id"]),
            (&"s1".into(), &"7".into(), &"r1".into())
        );
        assert_eq!(within["attempt"], 2);
        assert_eq!(within["trace_id"].as_str().unwrap().len(), 32);
        assert_eq!(within["trace_id"], done["trace_id"], "one request, one trace");
        assert_eq!((&done["saga"], &done["status"]), (&"outer".into(), &202.into()));
        assert_eq!((&outside["trace_id"], &outside["saga"]), (&"".into(), &Value::Null));
    }

    #[test]
    fn a_field_overwrites_nothing_that_every_line_has() {
        let lines =
            logged(|| tracing::info_span!("s", service = "other").in_scope(|| tracing::info!(level = 9, "hello")));
        assert_eq!((&lines[0]["service"], &lines[0]["level"]), (&"me".into(), &"INFO".into()));
        assert_eq!((&lines[0]["field_service"], &lines[0]["field_level"]), (&"other".into(), &9.into()));
    }
}
