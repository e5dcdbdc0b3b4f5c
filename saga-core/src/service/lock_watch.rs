//! Says for whom a statement waits: a start that waits for a lock looks like one that hangs.
//!
//! Who runs the statement goes on waiting for as long as it takes. Over a second connection it is looked who has the lock,
//! and that is said once, and again only when somebody else has it.

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use std::{collections::BTreeSet, convert::Infallible, time::Duration};

/// A statement that takes longer is looked after, as often as this. Most locks are held for milliseconds.
const LOOK: Duration = Duration::from_secs(3);

/// What the second connection calls itself.
const APPLICATION: &str = "migrate-watch";

/// Looks after one connection's statements.
pub(super) struct LockWatch {
    options: PgConnectOptions,
    backend: i32,
}

/// Somebody who has, or comes before us for, a lock that we want: pid, application, state, age of the transaction in
/// seconds. Of what another role does, PostgreSQL may not tell us.
type Blocker = (i32, Option<String>, Option<String>, Option<i64>);

impl LockWatch {
    pub(super) async fn of(connection: &mut PgConnection, options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let backend = sqlx::query_scalar("select pg_backend_pid()").fetch_one(connection).await?;
        Ok(Self { options: options.clone().application_name(APPLICATION), backend })
    }

    /// Does `work`, a statement of the connection that is looked after; `say` is told for whom it waits.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>, say: impl Fn(&str)) -> T {
        tokio::select! {
            done = work => done,
            never = self.look(say) => match never {},
        }
    }

    async fn look(&self, say: impl Fn(&str)) -> Infallible {
        let (mut connection, mut told, mut blind) = (None, BTreeSet::new(), false);
        loop {
            tokio::time::sleep(LOOK).await;
            match self.blockers(&mut connection).await {
                Ok(blockers) => {
                    let new = blockers.iter().fold(false, |new, blocker| told.insert(blocker.0) | new);
                    if new {
                        say(&described(&blockers));
                    }
                }
                // Without knowing it, either, whether there is somebody: it may be a statement that takes long.
                Err(error) => {
                    connection = None;
                    if !std::mem::replace(&mut blind, true) {
                        let database = self.options.get_database();
                        tracing::warn!(database, pid = self.backend, %error,
                            "a migration takes long, and whether it waits for a lock cannot be looked up from here; \
                             `select pg_blocking_pids(pid)` tells");
                    }
                }
            }
        }
    }

    async fn blockers(&self, connection: &mut Option<PgConnection>) -> Result<Vec<Blocker>, sqlx::Error> {
        let connection = match connection {
            Some(connection) => connection,
            None => connection.insert(PgConnection::connect_with(&self.options).await?),
        };
        sqlx::query_as(
            "select distinct pid, application_name, state, extract(epoch from clock_timestamp() - xact_start)::bigint
               from unnest(pg_blocking_pids($1)) as blocker (pid)
               left join pg_stat_activity using (pid)
              order by pid",
        )
        .bind(self.backend)
        .fetch_all(connection)
        .await
    }
}

/// `pid 4711 (psql, idle in transaction, its transaction is 312 s old)`.
fn described(blockers: &[Blocker]) -> String {
    let one = |(pid, application, state, seconds): &Blocker| {
        if *pid == 0 {
            return "a prepared transaction (see pg_prepared_xacts)".to_owned();
        }
        let application = application.clone().filter(|name| !name.is_empty());
        let age = seconds.map(|seconds| format!("its transaction is {seconds} s old"));
        let known: Vec<String> = [application, state.clone(), age].into_iter().flatten().collect();
        if known.is_empty() { format!("pid {pid}") } else { format!("pid {pid} ({})", known.join(", ")) }
    };
    blockers.iter().map(one).collect::<Vec<_>>().join("; ")
}
