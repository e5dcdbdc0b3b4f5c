//! Reports which session a statement waits for: a start that waits for a lock looks like one that hangs.
//!
//! The statement goes on waiting for as long as it takes. Over a second connection the watch asks which sessions have
//! the lock. It reports them once, and again only when another session has it.

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use std::{collections::BTreeSet, convert::Infallible, time::Duration};

/// The watch begins when a statement takes longer than this, and looks again as often. Most locks are held for
/// milliseconds.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// The second connection's `application_name`.
const APPLICATION: &str = "migrate-watch";

/// Watches the statements of one connection.
pub(super) struct LockWatch {
    options: PgConnectOptions,
    backend: i32,
}

/// A session that has, or comes before us for, a lock that we want: pid, application, state, age of the transaction in
/// seconds. PostgreSQL may hide what another role does.
type Blocker = (i32, Option<String>, Option<String>, Option<i64>);

impl LockWatch {
    pub(super) async fn of(connection: &mut PgConnection, options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let backend = sqlx::query_scalar("select pg_backend_pid()").fetch_one(connection).await?;
        Ok(Self { options: options.clone().application_name(APPLICATION), backend })
    }

    /// Does `work`, a statement of the watched connection; `say` gets the sessions that it waits for.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>, say: impl Fn(&str)) -> T {
        tokio::select! {
            done = work => done,
            never = self.look(say) => match never {},
        }
    }

    async fn look(&self, say: impl Fn(&str)) -> Infallible {
        let (mut connection, mut logged, mut blind) = (None, BTreeSet::new(), false);
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match self.blockers(&mut connection).await {
                Ok(blockers) => {
                    let new = blockers.iter().fold(false, |new, blocker| logged.insert(blocker.0) | new);
                    if new {
                        say(&described(&blockers));
                    }
                }
                // It is then not known whether there is a blocker: the statement may just take long.
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

/// Describes blockers: `pid 4711 (psql, idle in transaction, its transaction is 312 s old)`.
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
