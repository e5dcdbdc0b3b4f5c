//! Faults that an operator has to set right (a table, a right, a clock): the partition waits, loudly, and gives nothing
//! up.

use crate::support::{Fixture, SOON, event, events, with_id};
use saga_core::{
    consumer::{Consumer, ConsumerHealth, HandleError, Handler, Message},
    id::MessageId,
    outbox::Tx,
    service::database::pool_options,
    testkit::{Log, Record, eventually, produce},
};
use sqlx::{AssertSqlSafe, PgPool};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use uuid::{NoContext, Timestamp, Uuid};

async fn run_sql(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(pool).await.unwrap();
}

async fn until_unhealthy(health: &ConsumerHealth, word: &str) {
    eventually(SOON, || async { health.check().is_err_and(|reason| reason.contains(word)).then_some(()) }).await;
}

#[tokio::test]
async fn a_missing_table_stops_the_partition_loudly_and_gives_nothing_up() {
    let log = Log::hear("saga_core=info");
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1;
    run_sql(&fixture.database.pool, "alter table handled rename to mislaid").await;
    fixture.send(&events(4, 40)).await;

    let running = fixture.start();
    until_unhealthy(&running.health, "relation \"handled\" does not exist").await;
    // The batch is tried again, and that is not logged again.
    let tries = || running.recorder.batches.lock().unwrap().len();
    eventually(SOON, || async { (tries() > 5).then_some(()) }).await;
    assert_eq!(log.said("the partition waits until this is set right").len(), 1);
    let parked: i64 =
        sqlx::query_scalar("select count(*) from inbox_parked").fetch_one(&fixture.database.pool).await.unwrap();
    assert_eq!((parked, fixture.dead_letters().await.len()), (0, 0));

    run_sql(&fixture.database.pool, "alter table mislaid rename to handled").await;
    fixture.until_handled(40).await;
    eventually(SOON, || async { running.health.check().ok() }).await;
    assert_eq!(log.said("the partition goes on").len(), 1);
    running.stop().await;
}

/// A handler that reads all columns of a table, as prepared statements do whose answer changes with it.
struct ReadsAll;

impl Handler for ReadsAll {
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        sqlx::query("select * from shelf").fetch_all(&mut **tx).await?;
        sqlx::query("insert into handled (value) select 'x' from generate_series(1, $1)")
            .bind(i32::try_from(batch.len()).unwrap())
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_is_added_under_warm_connections_costs_no_record() {
    let mut fixture = Fixture::new(8).await;
    fixture.config.attempts = 1;
    run_sql(&fixture.database.pool, "create table shelf (id bigint); insert into shelf values (1)").await;
    let stop = CancellationToken::new();
    let consumer = Consumer::new(fixture.config.clone(), fixture.database.pool.clone(), Arc::new(ReadsAll));
    let running = tokio::spawn(consumer.run(stop.clone()));
    let to_each = || (0..8).map(|n| Record { partition: Some(n), ..event("k", "x") }).collect::<Vec<_>>();
    produce(&fixture.topic, &to_each()).await;
    fixture.until_handled(8).await;

    run_sql(&fixture.database.pool, "alter table shelf add column place text").await;
    produce(&fixture.topic, &to_each()).await;

    fixture.until_handled(16).await;
    assert!(fixture.parked().await.is_empty() && fixture.dead_letters().await.is_empty());
    stop.cancel();
    running.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_of_its_own_that_always_fails_is_shown_by_health() {
    let fixture = Fixture::new(1).await;
    run_sql(
        &fixture.database.pool,
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no room'; end $$;
         create trigger refuse before insert on inbox_parked for each row execute function refuse()",
    )
    .await;
    fixture.send(&[event("k", "1")]).await;

    let running = fixture.start_with(|_| Err(anyhow::anyhow!("not yet").into()));
    until_unhealthy(&running.health, "no room").await;

    run_sql(&fixture.database.pool, "drop trigger refuse on inbox_parked").await;
    fixture.until_dead_letters(1).await;
    running.stop().await;
}

/// A pool whose sessions read a clock that a test can set: `clock_timestamp()` is found in `public` first.
async fn with_a_clock(fixture: &Fixture) -> PgPool {
    set_clock(fixture, "0").await;
    let options = fixture.database.pool.connect_options().as_ref().clone();
    pool_options(8).connect_with(options.options([("search_path", "public,pg_catalog")])).await.unwrap()
}

async fn set_clock(fixture: &Fixture, ahead: &str) {
    let sql = format!(
        "create or replace function public.clock_timestamp() returns timestamptz language sql volatile
         return pg_catalog.clock_timestamp() + interval '{ahead}'"
    );
    run_sql(&fixture.database.pool, &sql).await;
}

/// A message id that was made so many days ago.
fn aged(days: i64) -> MessageId {
    let at = time::OffsetDateTime::now_utc() - time::Duration::days(days);
    let seconds = u64::try_from(at.unix_timestamp()).unwrap();
    MessageId(Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, 0)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hosts_wrong_clock_gives_no_message_up_for_its_age() {
    let fixture = Fixture::new(1).await;
    let pool = with_a_clock(&fixture).await;
    // The host is twenty days ahead of its database, by whose clock the first message is new.
    set_clock(&fixture, "-20 days").await;
    let running = fixture.start_on(&pool);
    until_unhealthy(&running.health, "clocks of this host and of its database differ").await;
    fixture.send(&[with_id(aged(20), "a", "new"), event("a", "not yet")]).await;
    // By the host's clock the first would be too old, by the database's the second is from the future: it is not known
    // which.
    until_unhealthy(&running.health, "from the future, wait").await;
    assert!(fixture.dead_letters().await.is_empty());

    set_clock(&fixture, "0").await;
    let letters = fixture.until_dead_letters(1).await;
    assert_eq!(letters[0].1.as_deref(), Some("new"), "now it is known to be too old");
    assert_eq!(fixture.until_handled(1).await, [("a".into(), "not yet".into())]);
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_databases_clock_finds_new_is_handled_whatever_the_hosts_says() {
    let fixture = Fixture::new(1).await;
    let pool = with_a_clock(&fixture).await;
    set_clock(&fixture, "-20 days").await;
    fixture.send(&[with_id(aged(20), "a", "new")]).await;

    let running = fixture.start_on(&pool);

    assert_eq!(fixture.until_handled(1).await, [("a".into(), "new".into())]);
    assert!(running.health.check().unwrap_err().contains("clocks"), "but it is said");
    running.stop().await;
}

#[tokio::test]
async fn parked_records_that_nothing_tries_are_said_with_what_to_do() {
    let mut fixture = Fixture::new(1).await;
    fixture.config.attempts = 1_000;
    let pool = &fixture.database.pool;
    let fails = |message: &Message| match message.payload.as_deref() {
        Some(b"bad") => Err(HandleError::Failed(anyhow::anyhow!("not yet"))),
        _ => Ok(()),
    };
    fixture.send(&[event("a", "bad"), event("a", "behind")]).await;
    let running = fixture.start_with(fails);
    eventually(SOON, || async { (fixture.parked().await.len() == 2).then_some(()) }).await;
    running.stop().await;

    // The topic was made again with fewer partitions.
    let gone = "update inbox_parked set partition = 7, next_attempt_at = next_attempt_at - interval '6 minutes'";
    run_sql(pool, gone).await;
    let running = fixture.start();
    until_unhealthy(&running.health, "of partition 7 of ").await;
    until_unhealthy(&running.health, "set `partition` of these rows to one that it has").await;
    run_sql(
        pool,
        "update inbox_parked set partition = 0, parked_at = parked_at - interval '6 minutes';
         alter table inbox_parked add column were jsonb;
         update inbox_parked set were = headers, headers = '{}'",
    )
    .await;
    until_unhealthy(&running.health, "cannot be read by this build").await;
    assert!(fixture.handled().await.is_empty());
    run_sql(pool, "update inbox_parked set headers = were").await;
    fixture.until_unparked().await;
    assert_eq!(fixture.handled().await.len(), 2);
    eventually(SOON, || async { running.health.check().ok() }).await;
    running.stop().await;
}
