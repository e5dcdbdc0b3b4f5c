//! A saga engine for services that own a PostgreSQL database and talk over Kafka.
//!
//! The one sentence that everything follows from: **every message is one transaction: inbox row, state change, outbox
//! rows.** The modules, in reading order:
//!
//! | module | what it is |
//! |---|---|
//! | [`command`], [`topic`] | what two services agree on: typed commands with their replies, and where they travel |
//! | [`id`] | newtypes: [`id::SagaId`], [`id::MessageId`], [`id::CommandId`] |
//! | [`envelope`] | message headers (CloudEvents 1.0, Kafka binary mode) |
//! | [`trace`] | the trace context that a message carries |
//! | [`error_class`] | what an error of PostgreSQL or Kafka means: the one classifier |
//! | [`brokers`] | questions to Kafka's brokers, by a client that is replaced when it reaches none |
//! | [`part`] | how the work of a part goes: what health asks of each |
//! | [`outage`] | which dependencies are away, and since when: the one place that knows outages |
//! | [`retry`], [`clock`] | the only users of `backoff` and of time |
//! | [`json`] | limits of JSON from outside |
//! | [`card`] | card numbers, which no service may keep |
//! | [`outbox`] | append messages within the caller's transaction |
//! | [`transaction`] | the transaction that every part uses: bounded here and in the server |
//! | [`inbox`] | which messages of a batch are new |
//! | [`consumer`] | Kafka records to batches to one transaction per batch; retries, parking, dead letters |
//! | [`participant`] | command, decide, reply: fenced and idempotent, external effects by intent |
//! | [`saga`] | define a saga, decide (pure), persist, run, inspect |
//! | [`http`] | problem details, health, metrics, mountable inspection routes |
//! | [`service`] | what a `main` needs: configuration, telemetry, pools, migrations, topics, shutdown |

#![warn(clippy::missing_errors_doc)]

pub mod brokers;
pub mod card;
pub mod clock;
pub mod command;
pub mod consumer;
pub mod envelope;
pub mod error_class;
mod fail_point;
mod gather;
pub mod http;
pub mod id;
pub mod inbox;
pub mod json;
pub mod outage;
pub mod outbox;
mod panics;
pub mod part;
pub mod participant;
mod reason;
pub mod retry;
pub mod saga;
pub mod service;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod topic;
pub mod trace;
pub mod transaction;
