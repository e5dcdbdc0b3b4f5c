//! Retries: the only user of `backoff`.
