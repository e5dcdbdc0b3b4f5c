//! `order-svc rebuild`: an operator runs it, beside the service, when a copy is lost or wrong.

use crate::{
    catalogue::rebuild::{Missing, Rebuilt, rebuild},
    config::{Copied, IDENTITY},
    migrations,
};
use contracts::topics::INVENTORY_ITEMS;
use saga_core::service::{
    ConfigErrors, DatabaseSettings, KafkaSettings, ServiceArgs, database, migrate::migrate,
    telemetry::TelemetrySettings,
};

/// The settings of a rebuild: those of the service without its listeners.
#[derive(Debug)]
pub struct RebuildSettings {
    /// The settings of the orders' database.
    pub database: DatabaseSettings,
    /// The settings of the Kafka client that reads the topic.
    pub kafka: KafkaSettings,
    /// The settings of the logs.
    pub telemetry: TelemetrySettings,
}

impl RebuildSettings {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(args: &ServiceArgs, errors: &mut ConfigErrors) -> Option<Self> {
        let database = args.database.read(errors);
        let kafka = args.kafka.read(errors);
        let telemetry = args.telemetry.read(errors);
        Some(Self { database: database?, kafka: kafka?, telemetry: telemetry? })
    }
}

/// Makes a copy anew.
pub async fn run(what: Copied, settings: &RebuildSettings) -> anyhow::Result<()> {
    let Copied::Catalogue { withdraw_missing } = what;
    migrate(&settings.database, &migrations::all()).await?;
    // The pool keeps one connection for as long as the rebuild takes: its session has tables of its own.
    let one = database::pool_options(1).max_lifetime(None).idle_timeout(None);
    let pool = one.connect_lazy_with(settings.database.options.clone().application_name(IDENTITY.name));
    let what = if withdraw_missing { Missing::Withdraw } else { Missing::Stay };
    let rebuilt = rebuild(&pool, &settings.kafka.brokers, INVENTORY_ITEMS.name, what).await?;
    let Rebuilt { records, items, changed, missing, unreadable } = rebuilt;
    tracing::info!(records, items, changed, unreadable, "the catalogue is rebuilt");
    match (missing, withdraw_missing) {
        (0, _) => {}
        (missing, true) => tracing::info!(missing, "items that the topic does not have were withdrawn"),
        (missing, false) => tracing::warn!(
            missing,
            "items of the catalogue are not in the topic and were left as they are; with --withdraw-missing they cannot be \
             ordered any more"
        ),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_a_rebuild_show_no_secret() {
        let mut args = ServiceArgs::default();
        args.database.database_url = Some("postgres://me:hunter2@h/d".into());
        args.kafka.kafka_brokers = Some("h:1".into());
        let settings = RebuildSettings::read(&args, &mut ConfigErrors::default()).unwrap();
        let said = format!("{settings:?}{settings:#?}");
        assert!(!said.contains("hunter2") && said.contains("\"me\""), "{said}");
    }
}
