//! Every topic of the order platform, declared once. Each consumed topic has a dead letter topic beside it,
//! `<name>.dlt`.

use saga_core::topic::{Cleanup, Topic};

/// How many partitions the platform's topics have: as many consumers of a group can share one.
pub const PARTITIONS: i32 = 6;

/// Commands to `payment-svc`, keyed by saga.
pub const PAYMENTS_COMMANDS: Topic = Topic::events("payments.commands", PARTITIONS);
/// Commands to `inventory-svc`, keyed by saga.
pub const INVENTORY_COMMANDS: Topic = Topic::events("inventory.commands", PARTITIONS);
/// Replies to the order saga, keyed by saga.
pub const ORDERS_REPLIES: Topic = Topic::events("orders.replies", PARTITIONS);
/// What happened to orders, keyed by order.
pub const ORDERS_EVENTS: Topic = Topic::events("orders.events", PARTITIONS);
/// The catalogue: the last record of a key is the item as it is now.
pub const INVENTORY_ITEMS: Topic =
    Topic { name: "inventory.items", partitions: PARTITIONS, retention: None, cleanup: Cleanup::Compact };

/// The topics that the platform's participants may reply to. Configuration adds to it (`REPLY_TOPICS`).
pub const REPLIES: [&str; 1] = [ORDERS_REPLIES.name];

/// The sources whose commands the platform's participants take: the `ce_source` of a message is its outbox's name.
/// Configuration adds to it (`COMMAND_SOURCES`).
pub const COMMAND_SOURCES: [&str; 1] = ["orders"];
/// The types of the platform's sagas (`ce_sagatype`): a log line has a saga's id under the name of its type.
pub const SAGAS: [&str; 1] = ["order"];
/// The sources whose replies the order saga takes. Configuration adds to it (`REPLY_SOURCES`).
pub const REPLY_SOURCES: [&str; 2] = ["payments", "inventory"];
