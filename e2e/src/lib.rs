//! Whole-system tests: API, crash, chaos, audit.
