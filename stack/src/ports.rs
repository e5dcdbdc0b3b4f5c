//! Ports on which no process listens.
//!
//! A port that looks free may be another stack's that is just starting: it would answer for ours, and ours would be
//! taken for healthy. So a port is claimed by a lock in the cache, which the kernel releases when this process ends,
//! however it does.

use crate::{Error, Result, cache::Cache, directory};
use std::{
    fs::File,
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

/// The range lies below the ports that systems hand to outgoing connections. Such a connection could take a port
/// between the check and the server's start, or while a server is being restarted.
const RANGE: Range<u16> = 15_000..32_000;
/// How many claims may be refused; more mean that something else is wrong.
const CLAIMS_MAX: usize = 1_000;

/// The locks of the ports that this process has claimed, held as long as it lives.
static CLAIMED: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// A port on the loopback interface, chosen at random, on which no process listens or is about to. No other stack gets
/// it while this process lives.
pub fn free() -> Result<u16> {
    let claims = claims()?;
    for _ in 0..CLAIMS_MAX {
        let [a, b, ..] = *uuid::Uuid::new_v4().as_bytes();
        let port = RANGE.start + u16::from_be_bytes([a, b]) % (RANGE.end - RANGE.start);
        if claim(&claims, port)? {
            return Ok(port);
        }
    }
    Err(Error::Other(format!("found no free port from {} to {}", RANGE.start, RANGE.end)))
}

/// The port `wanted` when it is free, otherwise any.
pub fn free_or(wanted: u16) -> Result<u16> {
    if claim(&claims()?, wanted)? { Ok(wanted) } else { free() }
}

fn claims() -> Result<std::path::PathBuf> {
    let claims = Cache::open()?.entry("ports");
    directory::make(&claims)?;
    Ok(claims)
}

fn claim(claims: &Path, port: u16) -> Result<bool> {
    let path = claims.join(port.to_string());
    let file = File::create(&path).map_err(Error::io(format!("claim the port {port} ({})", path.display())))?;
    let free = file.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    if free {
        CLAIMED.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    }
    Ok(free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once_even_before_anybody_listens_there() {
        let place = tempfile::tempdir().unwrap();
        let port = free().unwrap();
        assert!(claim(place.path(), port).unwrap(), "nobody listens there");
        assert!(!claim(place.path(), port).unwrap(), "but it is claimed");
        let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let _listening = TcpListener::bind((Ipv4Addr::LOCALHOST, other)).unwrap();
        assert!(!claim(place.path(), other).unwrap(), "somebody listens there");
        assert_ne!(free_or(port).unwrap(), port);
    }
}
