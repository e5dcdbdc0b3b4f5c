//! What was found in the databases and the topics, as plain values.

use std::collections::BTreeMap;
use time::OffsetDateTime;
use uuid::Uuid;

/// Everything that the audit looks at.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// order-svc's orders.
    pub orders: BTreeMap<Uuid, OrderFact>,
    /// Which order each Idempotency-Key made.
    pub keys: BTreeMap<String, Uuid>,
    /// The engine's sagas.
    pub sagas: BTreeMap<Uuid, SagaFact>,
    /// Sagas that the timers know: when they are due.
    pub due: BTreeMap<Uuid, Option<OffsetDateTime>>,
    /// Replies that no replica could decide yet, by saga.
    pub undecided: Vec<Uuid>,
    /// payment-svc's ledger, in its order.
    pub payments: Vec<LedgerEntry>,
    /// What payment-svc's balances say, by order: held, captured, refunded.
    pub balances: BTreeMap<Uuid, [i64; 3]>,
    /// The gateway's authorizations.
    pub authorizations: Vec<Authorization>,
    /// The gateway's movements, in their order.
    pub movements: Vec<GatewayMovement>,
    /// inventory-svc's balances.
    pub stock: BTreeMap<String, Stock>,
    /// Its ledger.
    pub stock_movements: Vec<StockMovement>,
    /// Its reservations.
    pub reservations: Vec<Reservation>,
    /// Each service's messaging tables, by the name of its database, which is its outbox's name.
    pub databases: BTreeMap<String, Messaging>,
    /// Every record of every topic, dead letter topics too, per partition in order.
    pub records: Vec<RecordFact>,
    /// Records that a consumer group has not taken yet: (group, topic, partition, how many).
    pub lag: Vec<(String, String, i32, i64)>,
    /// The database's time when this was read.
    pub now: Option<OffsetDateTime>,
}

/// An order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderFact {
    /// Where it stands.
    pub status: String,
    /// In minor units.
    pub total: i64,
    /// ISO 4217.
    pub currency: String,
    /// The sequence of its last status.
    pub version: i64,
    /// Pieces by sku.
    pub lines: BTreeMap<String, i64>,
    /// Its lines' prices times quantities.
    pub sum_of_lines: i64,
    /// (sequence, previous, status), in order.
    pub history: Vec<(i64, Option<String>, String)>,
}

/// A saga.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SagaFact {
    /// Where it stands.
    pub status: String,
    /// Its events so far.
    pub revision: i32,
    /// (revision, kind), in order.
    pub log: Vec<(i32, String)>,
}

/// An entry of payment-svc's ledger: one side of a movement of money.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerEntry {
    /// Whose.
    pub order: Uuid,
    /// `authorize`, `void`, `capture`, `refund`.
    pub movement: String,
    /// `customer`, `held`, `merchant`.
    pub account: String,
    /// In minor units; what enters the account is positive.
    pub amount: i64,
    /// ISO 4217.
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
    /// Held in all.
    pub authorized: i64,
    /// Let go.
    pub voided: i64,
    /// Taken.
    pub captured: i64,
    /// Given back.
    pub refunded: i64,
}

impl Balance {
    /// With one movement more.
    pub fn add(&mut self, kind: &str, amount: i64) {
        match kind {
            "authorized" => self.authorized += amount,
            "voided" => self.voided += amount,
            "captured" => self.captured += amount,
            _ => self.refunded += amount,
        }
    }

    /// What is neither taken nor let go.
    pub fn held(&self) -> i64 {
        self.authorized - self.voided - self.captured
    }
}

/// The gateway's view of one authorization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    /// The gateway's name of it.
    pub reference: String,
    /// Whose: the order's id as text.
    pub order: String,
    /// ISO 4217.
    pub currency: String,
    /// What its balances say.
    pub balance: Balance,
    /// What it says is still held.
    pub held: i64,
}

/// A movement of money as the gateway has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayMovement {
    /// Which authorization's.
    pub reference: String,
    /// The idempotency key that it came under.
    pub key: String,
    /// `authorized`, `voided`, `captured`, `refunded`.
    pub kind: String,
    /// In minor units.
    pub amount: i64,
}

/// How many pieces there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stock {
    /// Free.
    pub on_hand: i64,
    /// Put aside.
    pub reserved: i64,
}

/// A movement of stock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockMovement {
    /// Of what.
    pub sku: String,
    /// `adjusted`, `reserved`, `released`, `committed`.
    pub kind: String,
    /// Pieces that became free.
    pub on_hand: i64,
    /// Pieces that were put aside.
    pub reserved: i64,
    /// For which reservation.
    pub reservation: Option<Uuid>,
}

/// A reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    /// Its id.
    pub id: Uuid,
    /// Whose.
    pub order: Uuid,
    /// `reserved`, `released`, `committed`.
    pub status: String,
    /// Pieces by sku.
    pub lines: BTreeMap<String, i64>,
}

/// The messaging tables of one service's database.
#[derive(Debug, Clone, Default)]
pub struct Messaging {
    /// Rows of the outbox, by id.
    pub outbox: BTreeMap<i64, OutboxRow>,
    /// Rows that Kafka would not take: id to status.
    pub parked: BTreeMap<i64, String>,
    /// Topics that are paused, with the cause.
    pub paused: Vec<(String, String)>,
    /// What operators did, by action.
    pub operator_actions: BTreeMap<String, usize>,
    /// Records that failed and wait: (consumer, topic, partition, lane, offset, next attempt).
    pub parked_records: Vec<ParkedRecord>,
    /// External effects and undos that wait.
    pub intents: Vec<IntentFact>,
    /// Fences whose run or undo is still open: (saga, step, run, undo).
    pub open_fences: Vec<(Uuid, String, String, String)>,
}

/// A row of an outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxRow {
    /// `ce_id`.
    pub message: Uuid,
    /// Where to.
    pub topic: String,
    /// The record's key.
    pub key: Option<String>,
    /// `ce_type`.
    pub kind: String,
    /// Its payload.
    pub payload: Option<Vec<u8>>,
}

/// A record that a consumer could not handle yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedRecord {
    /// The consumer group.
    pub consumer: String,
    /// Its topic and partition, and the hash of its key: a line.
    pub line: (String, i32, Option<i64>),
    /// Its place.
    pub offset: i64,
    /// When it is tried again.
    pub next_attempt_at: Option<OffsetDateTime>,
    /// What went wrong last.
    pub reason: Option<String>,
}

/// An external effect, or an undo, that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntentFact {
    /// Whose.
    pub saga: Uuid,
    /// Which step's.
    pub step: String,
    /// `do` or `undo`.
    pub op: String,
    /// `waiting`, `ready`, `open`, `in_doubt`.
    pub state: String,
    /// When somebody takes it next.
    pub due_at: OffsetDateTime,
}

/// A record of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordFact {
    /// Its topic.
    pub topic: String,
    /// Its partition.
    pub partition: i32,
    /// Its place there.
    pub offset: i64,
    /// Its key.
    pub key: Option<String>,
    /// Its value.
    pub value: Option<Vec<u8>>,
    /// Its headers; the last of a name counts.
    pub headers: BTreeMap<String, String>,
}

impl RecordFact {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// `topic/partition@offset`.
    pub fn coordinates(&self) -> String {
        format!("{}/{}@{}", self.topic, self.partition, self.offset)
    }
}

/// A request that makes an order, and what the client was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its Idempotency-Key.
    pub key: String,
    /// The answer.
    pub answer: Answer,
}

/// What a client was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// 2xx, with this order.
    Accepted(Uuid),
    /// Another status.
    Refused(u16),
    /// No answer: it may or may not have happened.
    Unknown,
}
