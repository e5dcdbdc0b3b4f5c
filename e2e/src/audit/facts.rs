//! The content of the databases and the topics, as plain values.

pub use crate::topics::RecordFact;
use std::collections::BTreeMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// Everything that the audit judges.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// order-svc's orders, by id.
    pub orders: BTreeMap<Uuid, OrderFact>,
    /// The order that each Idempotency-Key made.
    pub keys: BTreeMap<String, Uuid>,
    /// The engine's sagas, by id.
    pub sagas: BTreeMap<Uuid, SagaFact>,
    /// The sagas that the timers know, with their due times.
    pub due: BTreeMap<Uuid, Option<OffsetDateTime>>,
    /// The sagas of replies that no replica could decide yet.
    pub undecided: Vec<Uuid>,
    /// payment-svc's ledger, in its order.
    pub payments: Vec<LedgerEntry>,
    /// payment-svc's balances, by order: held, captured, refunded.
    pub balances: BTreeMap<Uuid, [i64; 3]>,
    /// The authorizations of the gateway.
    pub authorizations: Vec<Authorization>,
    /// The gateway's movements, in their order.
    pub movements: Vec<GatewayMovement>,
    /// inventory-svc's balances, by sku.
    pub stock: BTreeMap<String, Stock>,
    /// inventory-svc's ledger, in its order.
    pub stock_movements: Vec<StockMovement>,
    /// inventory-svc's reservations, with their lines.
    pub reservations: Vec<Reservation>,
    /// Each service's messaging tables, by the name of its database, which is its outbox's name.
    pub databases: BTreeMap<String, Messaging>,
    /// Every record of every topic, dead letter topics too, per partition in order.
    pub records: Vec<RecordFact>,
    /// Records that a consumer group has not taken yet: (group, topic, partition, how many).
    pub lag: Vec<(String, String, i32, i64)>,
    /// The database's time when the facts were read.
    pub now: Option<OffsetDateTime>,
}

/// An order of order-svc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderFact {
    /// The name of the order's status.
    pub status: String,
    /// The total, in minor units.
    pub total: i64,
    /// The currency's code, ISO 4217.
    pub currency: String,
    /// The sequence of the last status.
    pub version: i64,
    /// The number of pieces, by sku.
    pub lines: BTreeMap<String, i64>,
    /// The sum of the lines' prices times their quantities, in minor units.
    pub sum_of_lines: i64,
    /// (sequence, previous, status), in order.
    pub history: Vec<(i64, Option<String>, String)>,
}

/// A saga of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SagaFact {
    /// The name of the saga's status.
    pub status: String,
    /// The number of its events so far.
    pub revision: i32,
    /// (revision, kind), in order.
    pub log: Vec<(i32, String)>,
}

/// An entry of payment-svc's ledger: one side of a movement of money.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerEntry {
    /// The order that is paid.
    pub order: Uuid,
    /// The kind of movement: `authorize`, `void`, `capture`, `refund`.
    pub movement: String,
    /// The account of this side: `customer`, `held`, `merchant`.
    pub account: String,
    /// The amount in minor units; positive where it enters the account.
    pub amount: i64,
    /// The currency's code, ISO 4217.
    pub currency: String,
}

impl LedgerEntry {
    /// The movement in the gateway's words, seen from the one account that it always touches.
    pub fn moved(&self) -> Option<(&'static str, i64)> {
        match (self.movement.as_str(), self.account.as_str()) {
            ("authorize", "held") => Some(("authorized", self.amount)),
            ("void", "held") => Some(("voided", -self.amount)),
            ("capture", "merchant") => Some(("captured", self.amount)),
            ("refund", "merchant") => Some(("refunded", -self.amount)),
            _ => None,
        }
    }
}

/// Sums by kind of movement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balance {
    /// Minor units held in all.
    pub authorized: i64,
    /// Minor units let go.
    pub voided: i64,
    /// Minor units taken.
    pub captured: i64,
    /// Minor units given back.
    pub refunded: i64,
}

impl Balance {
    /// Adds one movement.
    pub fn add(&mut self, kind: &str, amount: i64) {
        match kind {
            "authorized" => self.authorized += amount,
            "voided" => self.voided += amount,
            "captured" => self.captured += amount,
            _ => self.refunded += amount,
        }
    }

    /// The minor units that are neither taken nor let go.
    pub fn held(&self) -> i64 {
        self.authorized - self.voided - self.captured
    }
}

/// The gateway's view of one authorization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    /// The gateway's reference of the authorization.
    pub reference: String,
    /// The order's id as text.
    pub order: String,
    /// The currency's code, ISO 4217.
    pub currency: String,
    /// The sums of its balances.
    pub balance: Balance,
    /// The minor units that are still held, as the gateway has it.
    pub held: i64,
}

/// A movement of money in the gateway's books.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayMovement {
    /// The reference of the authorization.
    pub reference: String,
    /// The idempotency key of its request.
    pub key: String,
    /// The kind of movement: `authorized`, `voided`, `captured`, `refunded`.
    pub kind: String,
    /// The amount, in minor units.
    pub amount: i64,
}

/// The pieces of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stock {
    /// Pieces that are free.
    pub on_hand: i64,
    /// Pieces that are put aside.
    pub reserved: i64,
}

/// A movement of stock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockMovement {
    /// The item's stock-keeping unit.
    pub sku: String,
    /// The kind of movement: `adjusted`, `reserved`, `released`, `committed`.
    pub kind: String,
    /// Pieces that became free; negative where they became fewer.
    pub on_hand: i64,
    /// Pieces that were put aside; negative where they became fewer.
    pub reserved: i64,
    /// The reservation that it belongs to; `None` for an adjustment.
    pub reservation: Option<Uuid>,
}

/// A reservation of an order's pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// The id of the reservation.
    pub id: Uuid,
    /// The order that the pieces are for.
    pub order: Uuid,
    /// The status: `reserved`, `released`, `committed`.
    pub status: String,
    /// The number of pieces, by sku.
    pub lines: BTreeMap<String, i64>,
}

/// The messaging tables of one service's database.
#[derive(Debug, Clone, Default)]
pub struct Messaging {
    /// Rows of the outbox, by id.
    pub outbox: BTreeMap<i64, OutboxRow>,
    /// The rows that Kafka would not take: id to status.
    pub parked: BTreeMap<i64, String>,
    /// Topics that are paused, with the cause.
    pub paused: Vec<(String, String)>,
    /// The number of operators' actions, by action.
    pub operator_actions: BTreeMap<String, usize>,
    /// Records that failed and wait: (consumer, topic, partition, lane, offset, next attempt).
    pub parked_records: Vec<ParkedRecord>,
    /// The external effects and undos that wait.
    pub intents: Vec<IntentFact>,
    /// Fences whose run or undo is still open: (saga, step, run, undo).
    pub open_fences: Vec<(Uuid, String, String, String)>,
}

/// A row of an outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// The message's id, `ce_id`.
    pub message: Uuid,
    /// The topic that the row goes to.
    pub topic: String,
    /// The key of the record.
    pub key: Option<String>,
    /// The message's type, `ce_type`.
    pub kind: String,
    /// The payload, `None` for a tombstone.
    pub payload: Option<Vec<u8>>,
}

/// A record that a consumer could not handle yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedRecord {
    /// The group of the consumer.
    pub consumer: String,
    /// The topic, the partition, and the hash of the record's key: a line.
    pub line: (String, i32, Option<i64>),
    /// The offset in the partition.
    pub offset: i64,
    /// When the record is tried again; `None` behind another of its line.
    pub next_attempt_at: Option<OffsetDateTime>,
    /// The reason of the last failure, in words.
    pub reason: Option<String>,
}

/// An external effect, or an undo, that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntentFact {
    /// The saga that the effect is of.
    pub saga: Uuid,
    /// The name of the step.
    pub step: String,
    /// The direction: `do` or `undo`.
    pub op: String,
    /// The state: `waiting`, `ready`, `open`, `in_doubt`.
    pub state: String,
    /// When an executor takes it next.
    pub due_at: OffsetDateTime,
}

/// A request that makes an order, and the answer to its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The request's Idempotency-Key.
    pub key: String,
    /// The last answer to the request.
    pub answer: PostAnswer,
}

/// The answer that a client got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PostAnswer {
    /// The answer was 2xx, with this order.
    Accepted(Uuid),
    /// The answer had another status.
    Refused(u16),
    /// There was no answer: the request may or may not have been done.
    Unknown,
}
