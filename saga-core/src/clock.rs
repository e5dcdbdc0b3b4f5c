//! Time: the only place that reads the clock.
