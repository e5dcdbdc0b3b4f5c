//! What tests need: real databases and topics with random names, fault injection, waiting without sleeping.
//!
//! Everything here talks to a real PostgreSQL (`DATABASE_URL`) and a real Apache Kafka (`KAFKA_BROKERS`); there is no
//! stand-in for either. A test owns what it creates and removes it when it ends, so that all tests share two servers.
//!
//! ```no_run
//! use saga_core::testkit::{TestDatabase, TestTopic, eventually};
//! use saga_core::service::messaging_migrations;
//! use std::time::Duration;
//!
//! # async fn test() {
//! let database = TestDatabase::new(&[messaging_migrations()]).await;
//! let topic = TestTopic::create("orders", 3).await;
//! // The parts under test run against both. The test waits for what it is to see, with a bound.
//! eventually(Duration::from_secs(10), || async {
//!     let rows: i64 = sqlx::query_scalar("select count(*) from outbox").fetch_one(&database.pool).await.ok()?;
//!     (rows == 1).then_some(())
//! })
//! .await;
//! # }
//! ```

pub mod database;
pub mod explorer;
pub mod failpoints;
pub mod kafka;
mod kafka_proxy;
mod log;
mod proxy;
mod time;
mod waiting;

use crate::consumer::{HandleError, Handler, Message};
use sqlx::PgPool;

pub use crate::service::Migrations;
pub use database::TestDatabase;
pub use failpoints::FailPoint;
pub use kafka::{
    Record, TestTopic, brokers, count_to_end, create_topic, delete_topic, map_to_end, produce, read_to_end,
};
pub use kafka_proxy::KafkaProxy;
pub use log::Log;
pub use proxy::FreezingProxy;
pub use time::{WrongClock, time_passes};
pub use waiting::{eventually, within};

/// Hands `batch` to a handler as a consumer does, without inbox and Kafka: in a transaction, again after
/// [`HandleError::Again`], then the commit.
///
/// # Errors
/// Any other error of the handler, without the name of its message, or the database's; nothing is committed then.
pub async fn deliver(pool: &PgPool, handler: &impl Handler, batch: &[Message]) -> Result<(), HandleError> {
    loop {
        let mut tx = pool.begin().await?;
        match handler.handle(&mut tx, batch).await {
            Err(HandleError::Again) => tx.rollback().await?,
            Err(error) => return Err(error.parts().1),
            Ok(()) => {
                tx.commit().await?;
                handler.committed();
                return Ok(());
            }
        }
    }
}

/// How large a test is: `small` in the suite, and under `make soak` (`SOAK=1`) the size that a fault was reported with.
pub fn size(small: usize, reported: usize) -> usize {
    if std::env::var_os("SOAK").is_some() { reported } else { small }
}

/// `prefix` with a random suffix: for databases, topics, groups and fail point scopes.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", &uuid::Uuid::new_v4().simple().to_string()[..12])
}
