//! A database per test: created with a random name on the server of `DATABASE_URL`, migrated, dropped at the end.

use crate::{
    outbox::NUDGES,
    service::{DatabaseSettings, Migrations, Needs, database::pool_options, migrate::migrate, missing},
};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgListener},
};

/// The password of a role of [`TestDatabase::limited_to`].
const ROLES_PASSWORD: &str = "of-a-test";

/// A database of one test's own. Dropping this value drops the database and its connections.
pub struct TestDatabase {
    /// A pool of at most eight connections to it.
    pub pool: PgPool,
    /// The value of `DATABASE_URL` for a process that uses it.
    pub url: String,
    name: String,
    server: String,
}

impl TestDatabase {
    /// Creates a database and runs `migrations` in their order.
    ///
    /// # Panics
    /// If `DATABASE_URL` is not set or its server refuses: a test without its database can show nothing.
    pub async fn new(migrations: &[Migrations]) -> Self {
        let server = std::env::var("DATABASE_URL").expect("DATABASE_URL names the PostgreSQL server that tests use");
        let name = super::unique("test").replace('-', "_");
        let mut admin = PgConnection::connect(&server).await.expect("the server of DATABASE_URL accepts connections");
        sqlx::query(AssertSqlSafe(format!("create database {name} template template0")))
            .execute(&mut admin)
            .await
            .expect("the user of DATABASE_URL may create databases");
        admin.close().await.ok();
        let url = with_database(&server, &name);
        let settings = DatabaseSettings::from_url(&url).expect("the URL of DATABASE_URL's server with another name");
        migrate(&settings, migrations).await.expect("migrations run on an empty database");
        let pool = pool_options(8).connect(&url).await.expect("a database that was just created accepts connections");
        Self { pool, url, name, server }
    }

    /// A pool of a role that owns nothing here, and has these rights alone. There is one such role per database.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn limited_to(&self, needs: &[Needs]) -> PgPool {
        let mut sql = format!("create role {} login password '{ROLES_PASSWORD}';", self.name);
        for Needs { table, rights } in needs {
            sql.push_str(&format!("grant {} on {table} to {};", rights.join(", "), self.name));
        }
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.pool).await.expect("the user of DATABASE_URL may create roles");
        let options: PgConnectOptions = self.url.parse().expect("the URL of this database");
        let options = options.username(&self.name).password(ROLES_PASSWORD);
        let pool = pool_options(8).connect_with(options).await.expect("the role may log in");
        let mut connection = pool.acquire().await.expect("it has a connection");
        let lacks = missing(&mut connection, needs).await.expect("no table is locked");
        assert_eq!(lacks.issue, None, "readiness misses nothing that it asks for");
        pool
    }

    /// Listens to the nudges that wake the relay.
    ///
    /// # Panics
    /// When the server refuses.
    pub async fn nudges(&self) -> PgListener {
        let mut listener = PgListener::connect(&self.url).await.expect("the test's database accepts connections");
        listener.listen(NUDGES).await.expect("anybody may listen");
        listener
    }

    /// Cuts every connection to this database but its own, as a crash of the server would; returns how many.
    pub async fn cut_connections(&self) -> i64 {
        let mut admin = PgConnection::connect(&self.server).await.expect("the server is there");
        sqlx::query_scalar("select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = $1")
            .bind(&self.name)
            .fetch_one(&mut admin)
            .await
            .expect("the user of DATABASE_URL may terminate backends")
    }

    /// Begins an outage: refuses new connections and cuts the existing ones, until [`TestDatabase::open`].
    pub async fn shut(&self) {
        self.alter("with allow_connections false").await;
        self.cut_connections().await;
    }

    /// Ends an outage.
    pub async fn open(&self) {
        self.alter("with allow_connections true").await;
    }

    async fn alter(&self, how: &str) {
        let mut admin = PgConnection::connect(&self.server).await.expect("the server is there");
        sqlx::query(AssertSqlSafe(format!("alter database {} {how}", self.name)))
            .execute(&mut admin)
            .await
            .expect("the user of DATABASE_URL owns the test's database");
    }
}

/// `server` with its database replaced by `name`.
fn with_database(server: &str, name: &str) -> String {
    let (base, query) = server.split_once('?').map_or((server, None), |(base, query)| (base, Some(query)));
    let authority = base.find("://").map_or(0, |at| at + 3);
    let end = base[authority..].find('/').map_or(base.len(), |at| authority + at);
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("{}/{name}{query}", &base[..end])
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.name.clone());
        // A thread with a runtime of its own: the test's runtime may be the one that is being torn down.
        super::waiting::clean_up(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                let Ok(mut admin) = PgConnection::connect(&server).await else { return };
                for what in ["database if exists {} with (force)", "role if exists {}"] {
                    let sql = AssertSqlSafe(format!("drop {}", what.replace("{}", &name)));
                    sqlx::query(sql).execute(&mut admin).await.ok();
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_of_a_url_is_replaced_and_its_options_are_kept() {
        assert_eq!(with_database("postgres://u:p@h:1/a?x=y", "b"), "postgres://u:p@h:1/b?x=y");
        assert_eq!(with_database("postgres://u@h", "b"), "postgres://u@h/b");
        assert_eq!(with_database("postgres://h/?sslmode=disable", "b"), "postgres://h/b?sslmode=disable");
    }
}
