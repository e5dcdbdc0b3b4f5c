//! The testkit against the real servers.

use saga_core::testkit::{Record, TestDatabase, TestTopic, produce, read_to_end};

#[tokio::test]
async fn a_test_database_is_gone_when_its_test_is_over() {
    let database = TestDatabase::new(&[]).await;
    let name: String = sqlx::query_scalar("select current_database()::text").fetch_one(&database.pool).await.unwrap();
    drop(database);
    let other = TestDatabase::new(&[]).await;
    let left: i64 = sqlx::query_scalar("select count(*) from pg_database where datname = $1")
        .bind(&name)
        .fetch_one(&other.pool)
        .await
        .unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn what_is_produced_is_read_back_in_order_with_headers_and_tombstones() {
    let topic = TestTopic::create("testkit", 2).await;
    let records: Vec<Record> = (0..100)
        .map(|n: u8| Record {
            partition: Some(i32::from(n % 2)),
            key: Some(vec![n]),
            value: (n != 7).then(|| vec![n; 3]),
            headers: vec![("a".into(), Some(vec![n])), ("b".into(), None)],
            ..Record::default()
        })
        .collect();
    produce(&topic, &records).await;
    let mut read = read_to_end(&topic).await;
    read.sort_by_key(|record| record.key.clone());
    for record in &mut read {
        record.offset = 0;
    }
    assert_eq!(read, records);
}
