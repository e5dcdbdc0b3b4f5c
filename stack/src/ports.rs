//! Ports that nobody uses.

use crate::{Error, Result};
use std::{
    net::{Ipv4Addr, TcpListener},
    ops::Range,
};

/// Below the ports that systems hand to outgoing connections: one of those could take a port between our look and the
/// server's start, or while a server is being restarted.
const RANGE: Range<u16> = 15_000..32_000;
/// More refusals than this mean that something else is wrong.
const TRIES: usize = 1_000;

/// Whether nobody listens there.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// A port on the loopback interface that nobody listens on now, chosen at random so that parallel runs seldom meet.
pub fn free() -> Result<u16> {
    for _ in 0..TRIES {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let port = RANGE.start + u16::from_be_bytes([a, b]) % (RANGE.end - RANGE.start);
        if is_free(port) {
            return Ok(port);
        }
    }
    Err(Error::Other(format!("found no free port from {} to {}", RANGE.start, RANGE.end)))
}

/// `wanted` when it is free, otherwise any.
pub fn free_or(wanted: u16) -> Result<u16> {
    if is_free(wanted) { Ok(wanted) } else { free() }
}
