//! What the order saga can ask for. The fence around each (saga-core's participant) answers a repeat from what is
//! stored and refuses a reservation whose release came first; here is only what happens once.

use crate::{
    domain::{Closing, gather},
    stock::{self, Closed, Reserving},
};
use async_trait::async_trait;
use contracts::inventory::{CommitStock, OutOfStock, ReleaseStock, ReserveStock, Reserved};
use saga_core::{
    command::Done,
    outbox::Tx,
    participant::{CommandContext, CommandHandler, Decision, Participant, Ran, UndoHandler},
};

/// The participant of `inventory.commands`.
#[must_use]
pub fn participant() -> Participant {
    Participant::new("inventory")
        .on::<ReserveStock>(Reserve)
        .on_undo::<ReserveStock, ReleaseStock>(Release)
        .on::<CommitStock>(Commit)
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
        // Nobody has as many as do not fit a number.
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
        _: Ran<Reserved>,
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
