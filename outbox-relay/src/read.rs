//! Reading: which rows come next, page by page, ahead of the publisher.
//!
//! | module | what it is |
//! |---|---|
//! | `window` | the statements that find the rows of a window: the outbox between two snapshots |
//! | `cursor` | a window in pages, by id |
//! | `nudges` | the word of services that something was committed |
//! | `reader` | reads ahead for the main stream; follows it for a topic that is set apart |
//!
//! Reading records nothing. When the process dies, the next owner reads again from the recorded position.

pub(crate) mod cursor;
pub(crate) mod nudges;
pub(crate) mod reader;
pub(crate) mod window;
