//! Logs, traces and metrics of a process.
//!
//! Trace ids exist whether or not traces are sent anywhere. Every request and message gets one, [`crate::trace`]
//! carries it from HTTP through the outbox and Kafka to the consumer, and every log line has it. Spans are exported by
//! OTLP only when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, with their texts cleaned as those of the log are. A span that
//! cannot be delivered is dropped, never waited for.

pub use super::log_line::name_sagas;
use super::{
    config::{ConfigErrors, Secret, http_url},
    in_clear,
    log_line::{self, JsonLines},
    spans::CleanSpans,
};

use metrics_exporter_prometheus::{BuildError, PrometheusBuilder, PrometheusHandle};
use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use std::{io, sync::OnceLock, time::Duration};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::LevelFilter, layer::SubscriberExt, util::SubscriberInitExt,
};

/// The levels of libraries that repeat themselves, unless the filter names them. Their users here log once that Kafka
/// or the database is away. librdkafka logs each failed reconnect; sqlx logs each connection that it finds broken, and
/// each that a task waits for. SQL notices are PostgreSQL's chatter.
const QUIET: [(&str, LevelFilter); 6] = [
    ("librdkafka", LevelFilter::OFF),
    ("rdkafka", LevelFilter::OFF),
    ("sqlx::pool", LevelFilter::ERROR),
    ("sqlx_core::pool", LevelFilter::ERROR),
    ("sqlx::postgres::notice", LevelFilter::WARN),
    ("refinery_core", LevelFilter::WARN),
];
const DEFAULT_FILTER: &str = "info";

/// The upper bounds of the buckets, in seconds: from half a millisecond (one transaction) to half a minute (a step's
/// deadline).
const LATENCY_BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0];

/// How long the end of a process waits for its last spans to be sent.
const EXPORT_GRACE: Duration = Duration::from_secs(2);

/// The settings of a valid [`super::TelemetryArgs`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetrySettings {
    filter: String,
    format: Format,
    otlp_endpoint: Option<Secret>,
    otlp_credentials: Credentials,
}

/// Whether the exporter sends headers for the collector, which it reads from the environment itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Credentials {
    Sent,
    None,
}

impl Credentials {
    fn of_environment() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let any = ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"].into_iter().any(set);
        if any { Self::Sent } else { Self::None }
    }
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self {
            filter: with_quiet(DEFAULT_FILTER),
            format: Format::Json,
            otlp_endpoint: None,
            otlp_credentials: Credentials::None,
        }
    }
}

/// Adds the libraries' directives to the filter where it does not name them; they make nothing louder.
fn with_quiet(filter: &str) -> String {
    let level = |directive: &str| directive.parse::<LevelFilter>().ok();
    let everything = filter.split(',').filter_map(|directive| level(directive.trim())).next_back();
    let named: Vec<_> = filter
        .split(',')
        .map(str::trim)
        .filter(|directive| !directive.is_empty() && level(directive).is_none())
        .filter_map(|directive| directive.split(['=', '[']).next())
        .collect();
    let quiet = QUIET
        .iter()
        .filter(|(target, _)| !named.iter().any(|name| target.starts_with(name) || name.starts_with(target)))
        .map(|(target, most)| format!("{target}={}", everything.unwrap_or(LevelFilter::OFF).min(*most)));
    quiet.chain([filter.to_owned()]).collect::<Vec<_>>().join(",")
}

/// The form of a log line: for machines, or for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Text,
}

impl TelemetrySettings {
    pub(super) fn read(
        filter: Option<&str>,
        format: Option<&str>,
        endpoint: Option<&str>,
        errors: &mut ConfigErrors,
    ) -> Option<Self> {
        let filter = filter.unwrap_or(DEFAULT_FILTER);
        let filter = match EnvFilter::try_new(filter) {
            Ok(_) => Some(with_quiet(filter)),
            Err(_) => errors.add("RUST_LOG", "cannot be read", "set it to a filter such as `info,sqlx=debug`"),
        };
        let format = match format {
            None | Some("json") => Some(Format::Json),
            Some("text") => Some(Format::Text),
            Some(_) => errors.add("LOG_FORMAT", "is neither `json` nor `text`", "set it to one of them"),
        };
        let otlp_endpoint = match endpoint.map(|url| http_url(url).map(|_| url.into())) {
            Some(Err(wrong)) => errors.add(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                wrong,
                "set it to a URL such as https://collector:4318, with credentials in OTEL_EXPORTER_OTLP_HEADERS, or leave it \
                 out to send no traces",
            ),
            Some(Ok(url)) => Some(Some(url)),
            None => Some(None),
        };
        let otlp_credentials = Credentials::of_environment();
        Some(Self { filter: filter?, format: format?, otlp_endpoint: otlp_endpoint?, otlp_credentials })
    }
}

impl TelemetrySettings {
    fn warn_of_what_is_in_clear(&self) {
        if let (Some(endpoint), Credentials::Sent) = (&self.otlp_endpoint, self.otlp_credentials) {
            let what = "the credentials in OTEL_EXPORTER_OTLP_HEADERS";
            in_clear::warn_of_http("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.reveal(), what);
        }
    }
}

/// Keeps telemetry going; when dropped, the last spans are sent.
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: SdkTracerProvider,
    metrics: PrometheusHandle,
}

impl TelemetryGuard {
    /// The recorder that `/metrics` renders.
    #[must_use]
    pub fn metrics(&self) -> PrometheusHandle {
        self.metrics.clone()
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        // Without an exporter there are no spans to lose, and with one there is no place left to log an error.
        let _ = self.provider.shutdown_with_timeout(EXPORT_GRACE);
    }
}

/// Telemetry that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The OTLP exporter could not be built.
    #[error("the trace exporter cannot be built: {0}")]
    Exporter(#[from] opentelemetry_otlp::ExporterBuildError),
    /// The metrics recorder could not be installed.
    #[error("the metrics recorder cannot be installed: {0}")]
    Metrics(#[from] BuildError),
    /// Another subscriber is installed already.
    #[error("logging was set up twice: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets up logs, traces and metrics for the process named `service`. Call it once, first.
///
/// # Errors
/// An exporter or the metrics recorder cannot be made, or another subscriber is installed.
pub fn init(settings: &TelemetrySettings, service: &'static str) -> Result<TelemetryGuard, TelemetryError> {
    let resource = Resource::builder().with_attribute(KeyValue::new("service.name", service)).build();
    let mut provider = SdkTracerProvider::builder().with_resource(resource);
    if let Some(endpoint) = &settings.otlp_endpoint {
        let endpoint = format!("{}/v1/traces", endpoint.reveal().trim_end_matches('/'));
        let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().with_endpoint(endpoint).build()?;
        provider = provider.with_batch_exporter(CleanSpans(exporter));
    }
    let provider = provider.build();

    let lines: Box<dyn Layer<_> + Send + Sync> = match settings.format {
        Format::Json => JsonLines::new(service, io::stdout).boxed(),
        Format::Text => tracing_subscriber::fmt::layer().with_target(false).fmt_fields(log_line::cleaned()).boxed(),
    };
    // The filter was valid when the settings were read.
    let filter = EnvFilter::try_new(&settings.filter).unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    // The layer leaves out what is measured whenever a span's task is polled, and where in the code a span is. A batch
    // has a span for each message, and those are always the same place.
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(service))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false);
    Registry::default().with(filter).with(spans).with(lines).try_init()?;
    settings.warn_of_what_is_in_clear();
    Ok(TelemetryGuard { provider, metrics: metrics()? })
}

/// The process's metrics recorder, installed at the first call. Histograms have buckets, so that they can be added up
/// over replicas.
///
/// # Errors
/// Another recorder is installed.
pub fn metrics() -> Result<PrometheusHandle, BuildError> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    let installed = PrometheusBuilder::new().set_buckets(&LATENCY_BUCKETS)?.install_recorder();
    match (installed, HANDLE.get()) {
        (Ok(handle), _) => Ok(HANDLE.get_or_init(|| handle).clone()),
        // Another thread was faster.
        (Err(_), Some(handle)) => Ok(handle.clone()),
        (Err(error), None) => Err(error),
    }
}

#[cfg(all(test, feature = "testkit"))]
mod tests {
    use super::*;
    use crate::testkit::Log;

    fn heard(rust_log: Option<&str>) -> Vec<String> {
        let settings = TelemetrySettings::read(rust_log, None, None, &mut ConfigErrors::default()).unwrap();
        let log = Log::hear(&settings.filter);
        tracing::warn!(target: "sqlx_core::pool::inner", "a broken connection");
        tracing::error!(target: "librdkafka", "a failed reconnect");
        tracing::warn!(target: "sqlx::postgres::notice", "a notice");
        tracing::info!("ours");
        log.said("").iter().map(|line| line["message"].as_str().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn what_libraries_say_over_and_over_is_heard_when_it_is_asked_for_by_name() {
        assert_eq!(heard(None), ["a notice", "ours"]);
        assert_eq!(heard(Some("info")), ["a notice", "ours"]);
        assert_eq!(heard(Some("warn,librdkafka=error")), ["a failed reconnect", "a notice"]);
        assert_eq!(heard(Some("info,sqlx_core::pool=warn")), ["a broken connection", "a notice", "ours"]);
        assert_eq!(heard(Some("info,sqlx=debug")), ["a broken connection", "a notice", "ours"]);
    }

    #[test]
    fn credentials_for_a_collector_are_told_of_where_others_can_read_them() {
        let said = |endpoint: &str, otlp_credentials| {
            let read = TelemetrySettings::read(None, None, Some(endpoint), &mut ConfigErrors::default()).unwrap();
            let log = Log::hear("warn");
            TelemetrySettings { otlp_credentials, ..read }.warn_of_what_is_in_clear();
            log.said("OTEL_EXPORTER_OTLP_ENDPOINT is an http:// URL").len()
        };
        assert_eq!(said("http://collector:4318", Credentials::Sent), 1);
        assert_eq!(said("http://collector:4318", Credentials::None), 0);
        assert_eq!(said("https://collector:4318", Credentials::Sent), 0);
        assert_eq!(said("http://127.0.0.1:4318", Credentials::Sent), 0);
    }

    #[test]
    fn where_less_is_asked_for_less_is_heard() {
        assert!(heard(Some("error")).is_empty());
        assert!(heard(Some("off")).is_empty());
        assert!(heard(Some("saga_core::other=info")).is_empty());
    }
}
