//! The handlers of the order saga's commands. The fence around each (saga-core's participant) answers a repeat with the
//! stored reply, and refuses a reservation whose release came first. So the handlers here only do what happens once.

use crate::{
    domain::{Closing, gather},
    stock::{self, Closed, Reserving},
};
use async_trait::async_trait;
use contracts::{
    OrderId,
    inventory::{CommitStock, OutOfStock, ReleaseStock, ReserveStock, Reserved},
    product::Sku,
    topics,
};
use saga_core::{
    command::{Command, Done, Happened},
    consumer::{HandleError, Handler, Message},
    json,
    outbox::{AppendError, Tx},
    participant::{CommandContext, CommandHandler, Decision, Participant, UndoHandler},
    service::ParticipantSettings,
};

/// The handler of `inventory.commands`: the participant, behind the locks of a whole batch.
pub struct Commands(Participant);

impl Commands {
    /// The handler, ready for the consumer.
    #[must_use]
    pub fn new() -> Self {
        Self::beside(ParticipantSettings::default())
    }

    /// The handler for the consumer, with the topics and sources that configuration adds.
    #[must_use]
    pub fn beside(more: ParticipantSettings) -> Self {
        let participant = Participant::new("inventory")
            .replies_to(topics::REPLIES)
            .replies_to(more.reply_topics)
            .takes_commands_of(topics::COMMAND_SOURCES)
            .takes_commands_of(more.command_sources)
            .on::<ReserveStock>(Reserve)
            .on_undo::<ReserveStock, ReleaseStock>(Release)
            .on::<CommitStock>(Commit);
        Self(participant)
    }
}

impl Default for Commands {
    fn default() -> Self {
        Self::new()
    }
}

impl Handler for Commands {
    /// Each command locks its items in order, but a batch is many commands. Two partitions whose batches want the same
    /// items the other way round would deadlock, a second each time. So the handler first locks the items of all
    /// commands. A batch that shares more than items with this one (an order's fence, its reservation) is of the same
    /// partition, and waits.
    async fn handle(&self, tx: &mut Tx<'_>, batch: &[Message]) -> Result<(), HandleError> {
        if batch.len() > 1 {
            let (skus, orders) = touched(batch);
            stock::lock_all_in(tx, &skus, &orders).await?;
        }
        self.0.handle(tx, batch).await
    }

    fn ends_with_a_statement(&self) -> bool {
        self.0.ends_with_a_statement()
    }

    fn gave_up(
        &self,
        tx: &mut Tx<'_>,
        messages: &[(&Message, &str)],
    ) -> impl Future<Output = Result<(), AppendError>> + Send {
        self.0.gave_up(tx, messages)
    }

    fn committed(&self) {
        self.0.committed();
    }
}

/// What a batch will lock: items by name, and the items of orders. The participant refuses what cannot be read.
fn touched(batch: &[Message]) -> (Vec<Sku>, Vec<OrderId>) {
    let (mut skus, mut orders) = (Vec::new(), Vec::new());
    for message in batch {
        let payload = message.payload.as_deref().unwrap_or_default();
        match message.envelope.kind.as_str() {
            ReserveStock::TYPE => {
                let lines = json::read::<ReserveStock>(payload).map(|command| command.lines);
                skus.extend(lines.unwrap_or_default().into_iter().map(|line| line.sku));
            }
            ReleaseStock::TYPE => {
                orders.extend(json::read::<ReleaseStock>(payload).map(|command| command.order));
            }
            CommitStock::TYPE => {
                orders.extend(json::read::<CommitStock>(payload).map(|command| command.order));
            }
            _ => {}
        }
    }
    (skus, orders)
}

struct Reserve;

#[async_trait]
impl CommandHandler<ReserveStock> for Reserve {
    async fn decide(
        &self,
        tx: &mut Tx<'_>,
        cx: &CommandContext,
        command: ReserveStock,
    ) -> anyhow::Result<Decision<ReserveStock>> {
        // More pieces than fit a number are more than any stock has.
        let Some(wanted) = gather(&command.lines) else {
            return Ok(Decision::Rejected(OutOfStock { short: Vec::new() }));
        };
        Ok(match stock::reserve_in(tx, cx.idempotency_key(), command.order, &wanted).await? {
            Reserving::Reserved(pieces) => Decision::Done(Reserved { pieces }),
            Reserving::Short(short) => {
                tracing::info!(order = %command.order, lines = short.short.len(), "out of stock");
                Decision::Rejected(short)
            }
            Reserving::HasOne => Decision::Failed(format!("order {} has a reservation already", command.order)),
        })
    }
}

struct Release;

#[async_trait]
impl UndoHandler<ReserveStock, ReleaseStock> for Release {
    async fn undo(
        &self,
        tx: &mut Tx<'_>,
        _: &CommandContext,
        command: ReleaseStock,
        _: Happened<Reserved>,
    ) -> anyhow::Result<Decision<ReleaseStock>> {
        Ok(match stock::close_in(tx, command.order, Closing::Release).await? {
            // Without a reservation there is nothing to put back.
            Closed::Done | Closed::NoReservation => Decision::Done(Done {}),
            Closed::EndedOtherwise => Decision::Failed(format!("the stock of order {} left already", command.order)),
        })
    }
}

struct Commit;

#[async_trait]
impl CommandHandler<CommitStock> for Commit {
    async fn decide(
        &self,
        tx: &mut Tx<'_>,
        _: &CommandContext,
        command: CommitStock,
    ) -> anyhow::Result<Decision<CommitStock>> {
        Ok(match stock::close_in(tx, command.order, Closing::Commit).await? {
            Closed::Done => Decision::Done(Done {}),
            Closed::NoReservation => Decision::Failed(format!("order {} has no reservation", command.order)),
            Closed::EndedOtherwise => Decision::Failed(format!("the stock of order {} was released", command.order)),
        })
    }
}
