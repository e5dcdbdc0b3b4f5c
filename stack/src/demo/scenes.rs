//! Seven orders and how each must end.

use super::client::Client;
use anyhow::{Context, ensure};
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use stack::{platform::Stack, service::Service};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The stock at first: sku, name, price in cents, pieces.
const SHELVES: [(&str, &str, i64, i64); 3] =
    [("TEAPOT", "Teapot, 1.2 l", 3_490, 20), ("CUP", "Cup", 790, 100), ("SAMOVAR", "Samovar", 24_900, 1)];

/// What happens to an order while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meanwhile {
    /// Nothing happens but the order itself.
    Nothing,
    /// The customer cancels the order.
    Cancel,
    /// payment-svc is killed while it waits for the provider, and comes back.
    KillPayments,
}

/// An order and how it must end.
#[derive(Debug)]
pub(crate) struct Scene {
    /// What the scene shows, as a title.
    pub(crate) title: &'static str,
    customer: &'static str,
    items: &'static [(&'static str, i64)],
    method: &'static str,
    meanwhile: Meanwhile,
    status: &'static str,
    reason: Option<&'static str>,
}

/// The seven kinds of orders.
pub(crate) const ALL: &[Scene] = &[
    Scene {
        title: "An order is confirmed",
        customer: "alice",
        items: &[("TEAPOT", 1)],
        method: "tok_visa",
        meanwhile: Meanwhile::Nothing,
        status: "confirmed",
        reason: None,
    },
    Scene {
        title: "The payment is declined",
        customer: "bob",
        items: &[("TEAPOT", 1)],
        method: "tok_insufficient_funds",
        meanwhile: Meanwhile::Nothing,
        status: "cancelled",
        reason: Some("payment_declined"),
    },
    Scene {
        title: "Out of stock, so the payment is voided",
        customer: "carol",
        items: &[("SAMOVAR", 2)],
        method: "tok_visa",
        meanwhile: Meanwhile::Nothing,
        status: "cancelled",
        reason: Some("out_of_stock"),
    },
    Scene {
        title: "Several items, all or nothing",
        customer: "dave",
        items: &[("TEAPOT", 2), ("CUP", 12), ("SAMOVAR", 1)],
        method: "tok_visa",
        meanwhile: Meanwhile::Nothing,
        status: "confirmed",
        reason: None,
    },
    Scene {
        title: "The customer cancels while it runs",
        customer: "erin",
        items: &[("CUP", 6)],
        method: "tok_slow",
        meanwhile: Meanwhile::Cancel,
        status: "cancelled",
        reason: Some("cancelled_by_customer"),
    },
    Scene {
        title: "payment-svc is killed (SIGKILL) in the middle and comes back",
        customer: "frank",
        items: &[("CUP", 4)],
        method: "tok_slow",
        meanwhile: Meanwhile::KillPayments,
        status: "confirmed",
        reason: None,
    },
    Scene {
        title: "The provider's answer is lost and asked for again",
        customer: "grace",
        items: &[("TEAPOT", 1), ("CUP", 2)],
        method: "tok_lost_answer",
        meanwhile: Meanwhile::Nothing,
        status: "confirmed",
        reason: None,
    },
];

/// A scene that went as it must.
#[derive(Debug)]
pub(crate) struct Played {
    /// The scene that was played.
    pub(crate) scene: &'static Scene,
    /// The id of the scene's order.
    pub(crate) order: Uuid,
    /// The order as it ended, as JSON.
    pub(crate) ended: Value,
    /// The time from the request to the order's end.
    pub(crate) took: Duration,
    /// Events that the saga's timeline does not show, because they happened around it.
    pub(crate) notes: Vec<String>,
}

impl Played {
    /// How the order ended, for people: `cancelled (out_of_stock)`.
    pub(crate) fn status(&self) -> String {
        let status = self.ended["status"].as_str().unwrap_or("?");
        self.ended["reason"].as_str().map_or_else(|| status.to_owned(), |reason| format!("{status} ({reason})"))
    }
}

/// Creates the items, with their stock.
pub(crate) async fn seed(client: &Client) -> anyhow::Result<()> {
    for (sku, name, cents, pieces) in SHELVES {
        client.add_item(sku, name, cents, pieces).await?;
    }
    Ok(())
}

/// Plays one scene to its end.
pub(crate) async fn play(scene: &'static Scene, client: &Client, stack: &Stack) -> anyhow::Result<Played> {
    let start = Instant::now();
    let order = client.place(scene.customer, scene.items, scene.method).await?;
    let mut notes = Vec::new();
    match scene.meanwhile {
        Meanwhile::Nothing => {}
        Meanwhile::Cancel => client.cancel(order).await?,
        Meanwhile::KillPayments => notes.push(kill_payments(order, stack, start).await?),
    }
    let ended = client.settled(order).await?;
    let (status, reason) = (ended["status"].as_str(), ended["reason"].as_str());
    ensure!(
        status == Some(scene.status) && reason == scene.reason,
        "the order ended otherwise than it must ({}, {:?}): {ended}",
        scene.status,
        scene.reason
    );
    let took = start.elapsed();
    notes.extend(asked_again(order, stack).await?);
    Ok(Played { scene, order, ended, took, notes })
}

/// Kills payment-svc in the middle: the call to the provider has begun, and no answer to it is known yet.
async fn kill_payments(order: Uuid, stack: &Stack, start: Instant) -> anyhow::Result<String> {
    let mut database = PgConnection::connect(&stack.database_url("payments")).await?;
    loop {
        let called = sqlx::query("select from participant_intent where saga_id = $1 and attempts > 0").bind(order);
        if called.fetch_optional(&mut database).await?.is_some() {
            break;
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "payment-svc never called the provider for order {order}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let payments = stack.service(Service::Payments);
    let killed = start.elapsed().as_millis();
    payments.process.kill();
    payments.start_again().await.context("payment-svc did not come back")?;
    let back = start.elapsed().as_millis();
    Ok(format!("payment-svc was killed after {killed} ms, while it waited for the provider, and was back at {back} ms"))
}

/// How often the provider got one and the same authorization, where it was more than once; it moved money once.
async fn asked_again(order: Uuid, stack: &Stack) -> anyhow::Result<Option<String>> {
    let mut provider = PgConnection::connect(&stack.database_url("gateway")).await?;
    let asked: Option<i32> = sqlx::query_scalar(
        r#"select arrival.count
             from gateway_authorization
             join gateway_arrival arrival using (key)
            where "order" = $1"#,
    )
    .bind(order.to_string())
    .fetch_optional(&mut provider)
    .await?;
    let again = asked.filter(|times| *times > 1);
    Ok(again.map(|times| format!("the provider was asked {times} times to authorize under one key, and did it once")))
}
