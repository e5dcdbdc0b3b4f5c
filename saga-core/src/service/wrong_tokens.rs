//! Guesses at a listener's tokens: each address has 32, and one more a second.
//!
//! The listener checks what an address has left before it compares the token, so an answer beyond that reveals nothing
//! of the token. Other addresses are not held up; but callers behind one proxy share one address. (A leaky bucket:
//! Turner, "New directions in communications", 1986.)

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// How many wrong tokens an address may show at once.
const AT_ONCE: f64 = 32.0;
/// How many wrong tokens are forgiven in a second.
const FORGIVEN_PER_SECOND: f64 = 1.0;
/// How many addresses are remembered.
const ADDRESSES_MAX: usize = 4_096;

/// Wrong tokens that are not forgiven yet, by address.
#[derive(Debug, Default)]
pub(super) struct WrongTokens(Mutex<HashMap<IpAddr, (f64, Instant)>>);

impl WrongTokens {
    /// Whether a token that this address shows is to be compared.
    pub(super) fn lets_try(&self, peer: IpAddr, now: Instant) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&network(peer)).is_none_or(|wrong| left(wrong, now) + 1.0 <= AT_ONCE)
    }

    /// Counts a wrong token; returns whether it is this address's first for a while.
    pub(super) fn wrong(&self, peer: IpAddr, now: Instant) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= ADDRESSES_MAX {
            known.retain(|_, wrong| left(wrong, now) > 0.0);
        }
        if known.len() >= ADDRESSES_MAX && !known.contains_key(&network(peer)) {
            // Removes the address that has least to be forgiven. An address that is held up stays so, however many
            // others come.
            let least = known.iter().min_by(|(_, a), (_, b)| left(a, now).total_cmp(&left(b, now)));
            if let Some(address) = least.map(|(address, _)| *address) {
                known.remove(&address);
            }
        }
        let before = known.get(&network(peer)).map_or(0.0, |wrong| left(wrong, now));
        known.insert(network(peer), (before + 1.0, now));
        before == 0.0
    }
}

fn left((wrong, since): &(f64, Instant), now: Instant) -> f64 {
    (wrong - now.saturating_duration_since(*since).as_secs_f64() * FORGIVEN_PER_SECOND).max(0.0)
}

/// The network of an address: one customer of a provider has a whole network of IPv6 addresses.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use std::time::Duration;

    #[test]
    fn an_address_has_few_guesses_and_gets_them_back_and_others_have_theirs() {
        let (tokens, now) = (WrongTokens::default(), clock::monotonic());
        let [peer, neighbour, other]: [IpAddr; 3] =
            ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"].map(|address| address.parse().unwrap());
        assert!(tokens.wrong(peer, now), "the first is worth a line");
        for _ in 1..32 {
            assert!(tokens.lets_try(peer, now));
            assert!(!tokens.wrong(peer, now));
        }
        assert!(!tokens.lets_try(peer, now) && !tokens.lets_try(neighbour, now), "they are of one network");
        assert!(tokens.lets_try(other, now));
        assert!(tokens.lets_try(peer, now + Duration::from_secs(1)));
        assert!(tokens.wrong(peer, now + Duration::from_secs(60)), "all are forgiven");
    }

    #[test]
    fn a_flood_of_addresses_takes_no_more_room_and_forgives_no_guesser() {
        let (tokens, now) = (WrongTokens::default(), clock::monotonic());
        let guesser = IpAddr::from([192, 0, 2, 1]);
        while tokens.lets_try(guesser, now) {
            tokens.wrong(guesser, now);
        }
        for n in 0..10_000_u32 {
            tokens.wrong(IpAddr::from(n.to_be_bytes()), now);
        }
        assert!(tokens.0.lock().unwrap().len() <= ADDRESSES_MAX);
        assert!(!tokens.lets_try(guesser, now), "it is not forgiven because others came");
        assert!(tokens.lets_try(guesser, now + Duration::from_secs(1)));
    }
}
