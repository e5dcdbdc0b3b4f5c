//! Clients hang up in the middle of a request, ten thousand times. No acknowledged order is lost, no order is half
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

/// The number of requests that are cut off without an answer.
const CUT_OFF: usize = 10_000;
/// The most requests: a client that gets its answer in time is not cut off, so it takes more than those; never so many
/// more.
const REQUESTS: usize = 2 * CUT_OFF;
/// About as many clients as the pool has connections. So requests are cut in the middle of their transaction and not
/// while they wait for a connection.
const CLIENTS: usize = 12;
const PROBES: usize = 4;

/// The moment at which a client hangs up.
#[derive(Debug, Clone, Copy)]
enum HangUp {
    /// The client hangs up after so many bytes of its request; at least one, or there was no request.
    AfterSending(usize),
    /// The client hangs up after the whole request, so many microseconds later.
    AfterWaiting(u64),
    /// The client never hangs up: it reads the answer.
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

/// The end of a request as its client saw it.
#[derive(Debug)]
enum End {
    /// The client got not a byte of an answer: it hung up before.
    CutOff,
    /// The client got the answer, with the order.
    Acknowledged(Value),
    /// The pool was busy, a connection was not made, or the client hung up in the middle of its answer.
    Other,
}

/// Sends one request and hangs up, or is answered before.
async fn client(addr: SocketAddr, n: usize) -> End {
    talk(addr, n).await.unwrap_or(End::Other)
}

async fn talk(addr: SocketAddr, n: usize) -> std::io::Result<End> {
    let request = request(addr, &format!("hang-up-{n}"));
    // The moments are spread over the whole request, and over the time that the transaction takes; one client in twelve
    // stays.
    let hang_up = match n % 12 {
        0 => HangUp::Never,
        1..=3 => HangUp::AfterSending(1 + n * 37 % (request.len() - 1)),
        _ => HangUp::AfterWaiting((n as u64 * 7_919) % 15_000),
    };
    let mut stream = TcpStream::connect(addr).await?;
    // The client resets the connection and does not end it politely. So nothing waits in TIME_WAIT, and the server
    // learns of it at once.
    stream.set_zero_linger()?;
    let mut answer = Vec::new();
    match hang_up {
        HangUp::AfterSending(bytes) => {
            stream.write_all(&request[..bytes]).await?;
            Ok(End::CutOff)
        }
        HangUp::AfterWaiting(micros) => {
            stream.write_all(&request).await?;
            // An answer that arrives before the client loses its patience is an acknowledgement.
            tokio::select! {
                read = stream.read_to_end(&mut answer) => read.map(|_| answered(&answer)),
                () = patience(Duration::from_micros(micros)) => {
                    Ok(if answer.is_empty() { End::CutOff } else { End::Other })
                }
            }
        }
        HangUp::Never => {
            stream.write_all(&request).await?;
            stream.read_to_end(&mut answer).await?;
            Ok(answered(&answer))
        }
    }
}

/// Waits, as exactly as the scheduler: the runtime's timers count whole milliseconds.
async fn patience(length: Duration) {
    let begun = std::time::Instant::now();
    while begun.elapsed() < length {
        tokio::task::yield_now().await;
    }
}

fn answered(answer: &[u8]) -> End {
    let answer = String::from_utf8_lossy(answer);
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 202") => {
            End::Acknowledged(serde_json::from_str(body).expect("a 202 has an order"))
        }
        _ => End::Other,
    }
}

/// Writes one row after the other on the pool's connections while the storm lasts. On a connection that was left inside
/// a transaction, a write is acknowledged, and may be lost. Such a write is not the first statement of its transaction.
async fn probe(pool: PgPool, from: i64, storm: CancellationToken) -> (Vec<i64>, usize) {
    let (mut written, mut inside) = (Vec::new(), 0);
    for n in (from..).step_by(PROBES) {
        if storm.is_cancelled() {
            break;
        }
        // The statement is one message of the simple protocol, so that a transaction of its own begins with it.
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
    let mut clients =
        stream::iter(0..REQUESTS).map(|n| async move { (n, client(addr, n).await) }).buffer_unordered(CLIENTS);
    let (mut cut_off, mut acknowledged, mut other) = (Vec::new(), BTreeMap::new(), 0);
    while cut_off.len() < CUT_OFF
        && let Some((n, end)) = clients.next().await
    {
        match end {
            End::CutOff => cut_off.push(n),
            End::Acknowledged(order) => drop(acknowledged.insert(n, order)),
            End::Other => other += 1,
        }
    }
    // The last few clients hang up as well.
    drop(clients);
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
    assert_eq!(cut_off.len(), CUT_OFF, "beside {} acknowledged and {other} others", acknowledged.len());
    // One client in twelve stays for its answer; on a busy machine some of those hear that the pool is.
    assert!(acknowledged.len() >= CUT_OFF / 20, "only {} were acknowledged", acknowledged.len());

    // A request whose client hung up may still be at work; then every connection is idle and outside of any
    // transaction.
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
    // All or nothing: there are as many rows of everything as there are orders.
    let orders = shop.count("orders").await;
    let unheard = orders - acknowledged.len() as i64;
    println!(
        "{} cut off, {} acknowledged, {other} others, {unheard} orders unheard of",
        cut_off.len(),
        acknowledged.len()
    );
    // Otherwise the clients would hang up before a handler is at work for them.
    assert!(unheard >= CUT_OFF as i64 / 4, "only {unheard} requests were cut off while they were worked on");
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
    // Clients repeat the requests without an answer, on the connections that the storm went over.
    for n in cut_off.iter().step_by(97) {
        let order = shop.place(&format!("hang-up-{n}")).await;
        assert_eq!(shop.status(order).await, "pending");
    }
}
