//! Time that passes without a wait, and a host whose clock is wrong.

use crate::clock::HOST_IS_OFF_BY;
use sqlx::PgPool;
use std::sync::atomic::Ordering;

/// Ends the open wait of every saga in the database (a step's deadline, the pause before a resend): the engine's next
/// `tick` takes them. Deadlines of whole sagas stay as they are.
///
/// # Panics
/// If the database returns an error.
pub async fn time_passes(pool: &PgPool) {
    let mut tx = pool.begin().await.expect("a transaction begins");
    let waiting: Vec<uuid::Uuid> = sqlx::query_scalar(
        "select saga_id from saga where state #> '{status,open,due}' is not null order by saga_id for update",
    )
    .fetch_all(&mut *tx)
    .await
    .expect("sagas are locked");
    for sql in [
        "update saga set state = jsonb_set(state, '{status,open,due}', '1000'), armed_at = '2020-01-01'
          where saga_id = any($1)",
        "update saga_due set due_at = '2020-01-01' where saga_id = any($1)",
    ] {
        sqlx::query(sql).bind(&waiting).execute(&mut *tx).await.expect("their due times are moved");
    }
    tx.commit().await.expect("the transaction commits");
}

/// While this value lives, the clock of this process's host is wrong. It is one clock for all tests of the process.
#[derive(Debug)]
#[must_use = "the clock is right again when this is dropped"]
pub struct WrongClock(());

impl WrongClock {
    /// Sets the clock so many seconds ahead; negative: behind.
    pub fn ahead_by(seconds: i64) -> Self {
        HOST_IS_OFF_BY.store(seconds, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for WrongClock {
    fn drop(&mut self) {
        HOST_IS_OFF_BY.store(0, Ordering::Relaxed);
    }
}
