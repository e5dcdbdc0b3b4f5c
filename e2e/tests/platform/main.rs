//! The whole platform as processes. In one binary, so that tests which wait (for sessions and leases of what was killed to
//! run out) do so side by side.

mod audit;
mod bad_input;
mod copies;
mod crash;
mod doors;
mod edges;
mod openapi;
mod outcomes;
mod steps;
