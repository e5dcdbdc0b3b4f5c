//! Databases of a run: made anew, dropped at its end.

use crate::machine::Machine;
use saga_core::service::{DatabaseSettings, Migrations, database, migrate::migrate};
use sqlx::{AssertSqlSafe, PgPool, postgres::PgConnectOptions};
use std::str::FromStr;

/// A database of a run.
#[derive(Clone)]
pub struct Database {
    /// The database's name, with the prefix `bench_`.
    pub name: String,
    /// The URL to connect to it, with the password.
    pub url: String,
}

impl Database {
    /// Creates the database; one of the same name is dropped first.
    pub async fn create(machine: &Machine, name: &str, migrations: &[Migrations]) -> anyhow::Result<Self> {
        let mut admin = machine.admin().await?;
        let name = format!("bench_{name}");
        for sql in [format!("drop database if exists {name} with (force)"), format!("create database {name}")] {
            sqlx::query(AssertSqlSafe(sql)).execute(&mut admin).await?;
        }
        let options = PgConnectOptions::from_str(machine.database_url())?.database(&name);
        let database = Self { name, url: url_of(&options) };
        migrate(&database.settings(1)?, migrations).await?;
        Ok(database)
    }

    /// Drops the database, and cuts its connections.
    pub async fn drop(self, machine: &Machine) -> anyhow::Result<()> {
        let mut admin = machine.admin().await?;
        sqlx::query(AssertSqlSafe(format!("drop database {} with (force)", self.name))).execute(&mut admin).await?;
        Ok(())
    }

    /// The settings for the services' own code.
    pub fn settings(&self, max_connections: u32) -> Result<DatabaseSettings, sqlx::Error> {
        Ok(DatabaseSettings { max_connections, ..DatabaseSettings::from_url(&self.url)? })
    }

    /// A pool like the services'.
    pub async fn pool(&self, max_connections: u32) -> Result<PgPool, sqlx::Error> {
        database::connect(&self.settings(max_connections)?, "bench").await
    }
}

fn url_of(options: &PgConnectOptions) -> String {
    use sqlx::ConnectOptions as _;
    options.to_url_lossy().to_string()
}
