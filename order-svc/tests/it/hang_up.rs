//! Clients that hang up in the middle of a request, ten thousand times: no acknowledged order is lost, no order is half
//! written, and no connection of the pool is left inside a transaction.

use crate::support::{PATIENCE, Shop, basket, id_of};
use futures::{StreamExt, stream};
use saga_core::testkit::eventually;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool, Row};
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

const REQUESTS: usize = 10_000;
/// About as many as the pool has connections, so that requests are cut in the middle of their transaction and not while
/// they wait for a connection.
const CLIENTS: usize = 12;
const PROBES: usize = 4;

/// Where a client hangs up.
#[derive(Debug, Clone, Copy)]
enum HangUp {
    /// After so many bytes of its request.
    AfterSending(usize),
    /// After the whole request, so many microseconds later.
    AfterWaiting(u64),
    /// Never: it reads the answer.
    Never,
}

fn request(addr: SocketAddr, key: &str) -> Vec<u8> {
    let body = basket().to_string();
    format!(
        "POST /v1/orders HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\nidempotency-key: {key}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Sends one request and hangs up; the order if it was acknowledged before.
async fn client(addr: SocketAddr, n: usize) -> Option<Value> {
    let request = request(addr, &format!("hang-up-{n}"));
    // Spread over the whole request, and over the time that the transaction takes; one in ten stays.
    let hang_up = match n % 10 {
        0 => HangUp::Never,
        1 | 2 => HangUp::AfterSending(n * 37 % request.len()),
        _ => HangUp::AfterWaiting((n as u64 * 7_919) % 15_000),
    };
    let mut stream = TcpStream::connect(addr).await.ok()?;
    // A reset, not a polite end: nothing waits in TIME_WAIT, and the server learns of it at once.
    stream.set_zero_linger().ok()?;
    match hang_up {
        HangUp::AfterSending(bytes) => {
            stream.write_all(&request[..bytes]).await.ok()?;
            None
        }
        HangUp::AfterWaiting(micros) => {
            stream.write_all(&request).await.ok()?;
            // What arrives before the client loses its patience is an acknowledgement.
            tokio::select! {
                answer = read(&mut stream) => acknowledged(&answer?),
                () = patience(Duration::from_micros(micros)) => None,
            }
        }
        HangUp::Never => {
            stream.write_all(&request).await.ok()?;
            acknowledged(&read(&mut stream).await?)
        }
    }
}

/// As exact as the scheduler: the runtime's timers count whole milliseconds.
async fn patience(length: Duration) {
    let begun = std::time::Instant::now();
    while begun.elapsed() < length {
        tokio::task::yield_now().await;
    }
}

async fn read(stream: &mut TcpStream) -> Option<String> {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer)
}

fn acknowledged(answer: &str) -> Option<Value> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 202").then(|| serde_json::from_str(body).expect("a 202 has an order"))
}

/// Writes one row after the other on the pool's connections while the storm lasts. On a connection that somebody left
/// inside a transaction, a write is acknowledged, is not the first statement of its transaction, and may be lost.
async fn probe(pool: PgPool, from: i64, storm: CancellationToken) -> (Vec<i64>, usize) {
    let (mut written, mut inside) = (Vec::new(), 0);
    for n in (from..).step_by(PROBES) {
        if storm.is_cancelled() {
            break;
        }
        // As one message of the simple protocol, so that a transaction of its own begins with the statement.
        let write = format!("insert into probe values ({n}) returning transaction_timestamp() < statement_timestamp()");
        // The pool may be too busy for a while.
        if let Ok(row) = sqlx::raw_sql(AssertSqlSafe(write)).fetch_one(&pool).await {
            written.push(n);
            inside += usize::from(row.get::<bool, _>(0));
        }
    }
    (written, inside)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_clients_that_hang_up_lose_no_order_and_poison_no_connection() {
    let shop = Shop::open().await;
    let addr = shop.addr;
    sqlx::query("create table probe (n bigint)").execute(&shop.db.pool).await.unwrap();
    let storm = CancellationToken::new();
    let probes: Vec<_> =
        (0..PROBES).map(|n| tokio::spawn(probe(shop.db.pool.clone(), n as i64, storm.clone()))).collect();
    let acknowledged: BTreeMap<usize, Value> = stream::iter(0..REQUESTS)
        .map(|n| async move { client(addr, n).await.map(|order| (n, order)) })
        .buffer_unordered(CLIENTS)
        .filter_map(|acknowledged| async { acknowledged })
        .collect()
        .await;
    storm.cancel();
    let (mut written, mut inside) = (Vec::new(), 0);
    for probe in probes {
        let (rows, late) = probe.await.unwrap();
        written.extend(rows);
        inside += late;
    }
    assert_eq!(inside, 0, "of {} writes, so many were inside a transaction that somebody left", written.len());
    let kept: i64 = sqlx::query_scalar("select count(*) from probe where n = any($1)")
        .bind(&written)
        .fetch_one(&shop.db.pool)
        .await
        .unwrap();
    assert_eq!(kept, written.len() as i64, "writes were acknowledged and are lost");
    assert!(written.len() > 100, "the storm left no room for probes: {}", written.len());
    // One in ten stays for its answer; on a busy machine some of those hear that the pool is.
    assert!(acknowledged.len() >= REQUESTS / 20, "only {} were acknowledged", acknowledged.len());

    // Whoever hung up may still be at work; then every connection is idle and outside of any transaction.
    eventually(PATIENCE, || async {
        let busy =
            "pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and state <> 'idle'";
        (shop.count(busy).await == 0).then_some(())
    })
    .await;
    for (n, order) in &acknowledged {
        let found: bool = sqlx::query_scalar("select exists (select from orders where id = $1)")
            .bind(id_of(order).0)
            .fetch_one(&shop.db.pool)
            .await
            .unwrap();
        assert!(found, "order {order} of request {n} was acknowledged and is lost");
    }
    // All or nothing: as many of everything as there are orders.
    let orders = shop.count("orders").await;
    for (table, per_order) in [
        ("idempotency_answer", 1),
        ("order_line", 2),
        ("order_status_history", 1),
        ("saga", 1),
        ("outbox where topic = 'orders.events'", 1),
        ("outbox where topic = 'payments.commands'", 1),
    ] {
        assert_eq!(shop.count(table).await, orders * per_order, "{table}");
    }
    // Clients repeat what they heard nothing of, on the connections that the storm went over.
    let nobody_heard = (0..REQUESTS).filter(|n| !acknowledged.contains_key(n)).step_by(97);
    for n in nobody_heard {
        let order = shop.place(&format!("hang-up-{n}")).await;
        assert_eq!(shop.status(order).await, "pending");
    }
}
