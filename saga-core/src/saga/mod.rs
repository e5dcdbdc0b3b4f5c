//! Sagas: define, decide, persist, run, inspect.
