//! The order REST API; hosts the order saga and its inspection.
