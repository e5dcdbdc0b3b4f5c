//! The settings of the service's database.

use super::{
    ConfigErrors, number,
    secret::{DatabasePlace, Secret, database_url},
};
use clap::Args;
use sqlx::postgres::PgConnectOptions;
use std::{fmt, str::FromStr};

/// 16: on one small machine, four processes together stay below PostgreSQL's default of 100.
const DEFAULT_MAX_CONNECTIONS: u32 = 16;

/// The service's database.
#[derive(Debug, Clone, Default, Args)]
pub struct DatabaseArgs {
    /// The service's own PostgreSQL database, for example `postgres://user:secret@db:5432/orders?sslmode=verify-full`.
    /// Set the variable: a flag is read by every user of the machine
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, global = true)]
    pub database_url: Option<Secret>,
    /// The most connections this process opens to it [default: 16]
    #[arg(long, env = "DATABASE_MAX_CONNECTIONS", value_name = "NUMBER", hide_env_values = true, global = true)]
    pub database_max_connections: Option<String>,
}

/// The settings of a valid [`DatabaseArgs`].
#[derive(Clone)]
pub struct DatabaseSettings {
    /// The database's place; `sslmode` and the certificates are in the URL.
    pub options: PgConnectOptions,
    /// The most connections of the pool.
    pub max_connections: u32,
}

impl fmt::Debug for DatabaseSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, max_connections } = self;
        f.debug_struct("DatabaseSettings")
            .field("options", &DatabasePlace(options))
            .field("max_connections", max_connections)
            .finish()
    }
}

impl DatabaseSettings {
    /// Reads a URL that the program itself made (tests, tools).
    ///
    /// # Errors
    /// The text is no URL of a PostgreSQL database.
    pub fn from_url(url: &str) -> Result<Self, sqlx::Error> {
        Ok(Self { options: PgConnectOptions::from_str(url)?, max_connections: DEFAULT_MAX_CONNECTIONS })
    }
}

impl DatabaseArgs {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<DatabaseSettings> {
        let example = "set it to postgres://user:password@host:5432/database";
        let options = match Secret::given(self.database_url.as_ref()) {
            None => errors.add("DATABASE_URL", "is not set", example),
            Some(url) => database_url(url).map_or_else(|wrong| errors.add("DATABASE_URL", wrong, example), Some),
        };
        let max_connections =
            number(&self.database_max_connections, "DATABASE_MAX_CONNECTIONS", DEFAULT_MAX_CONNECTIONS, 2.., errors);
        Some(DatabaseSettings { options: options?, max_connections: max_connections? })
    }
}
