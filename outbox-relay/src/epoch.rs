//! The epoch that the ids of an outbox's rows count in; every record carries it (`ce_epoch`).
//!
//! A consumer for which the last value wins compares `ce_sequence`. That means something only as long as ids go on
//! where they were: not after a restore, which gives ids a second time, nor in a database that was made anew. So an
//! epoch's name consists of what changes then: the cluster, its timeline, the database, and the file of the sequence.
//! One epoch more than was needed does no harm.

use sqlx::PgConnection;
use std::sync::Arc;

/// The epoch of this database's outbox, as long as its lease is held.
pub(crate) async fn read(db: &mut PgConnection) -> Result<Arc<str>, sqlx::Error> {
    // The query takes the timeline of what is written now. The control file has that of the last checkpoint, and a
    // promotion comes before its checkpoint. `alter sequence … restart` and `truncate … restart identity` give the
    // sequence another file.
    let epoch: String = sqlx::query_scalar(
        "select concat_ws('-',
                          (select system_identifier from pg_control_system()),
                          ltrim(left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), '0'),
                          (select oid from pg_database where datname = current_database()),
                          pg_relation_filenode(pg_get_serial_sequence('outbox', 'id')::regclass))",
    )
    .fetch_one(db)
    .await?;
    Ok(epoch.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use saga_core::{service::messaging_migrations, testkit::TestDatabase};
    use std::collections::HashSet;

    #[tokio::test]
    async fn another_epoch_begins_with_another_database_and_with_ids_that_begin_again() {
        let (one, other) =
            (TestDatabase::new(&[messaging_migrations()]).await, TestDatabase::new(&[messaging_migrations()]).await);
        let of = async |database: &TestDatabase| read(&mut database.pool.acquire().await.unwrap()).await.unwrap();
        let first = of(&one).await;
        let parts: Vec<&str> = first.split('-').collect();
        assert_eq!(parts.len(), 4, "{first}");
        assert!(parts.iter().all(|part| !part.is_empty()), "{first}");
        sqlx::query("insert into outbox (message_id, topic, type) values (gen_random_uuid(), 't', 'a.v1')")
            .execute(&one.pool)
            .await
            .unwrap();
        assert_eq!(of(&one).await, first, "as long as ids go on");
        sqlx::query("truncate outbox restart identity").execute(&one.pool).await.unwrap();
        let again = of(&one).await;
        assert_eq!(HashSet::from([first, again, of(&other).await]).len(), 3);
    }
}
