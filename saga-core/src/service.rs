//! What a `main` needs, so that it stays a page: configuration, telemetry, pools, migrations, topics, health, the two
//! listeners, shutdown.
//!
//! | module | what it is |
//! |---|---|
//! | [`config`] | flags and environment, validated whole: every mistake at once |
//! | [`telemetry`] | JSON logs that carry service, trace and ids; OTLP when asked for; metrics |
//! | [`in_clear`] | says at the start what others on the way can read |
//! | [`database`], [`migrate`] | a pool that is safe to cancel on; migrations under a lock |
//! | [`topics`] | creates declared topics, reports mismatches |
//! | [`health`], [`admin`] | three answers: does the loop turn, can callers be served, does all work move; the admin listener with its roles |
//! | [`serve()`] | HTTP connections, each with a bound on silence |
//! | [`supervisor`], [`shutdown`] | named tasks that start, fail and stop together, within a bound |
//! | [`assembly`] | a service from its parts, the same way for every service |

pub mod admin;
pub mod assembly;
pub mod config;
mod connections;
pub mod database;
pub mod health;
pub mod in_clear;
mod lock_watch;
pub(crate) mod log_line;
pub mod migrate;
pub mod shutdown;
mod spans;
pub mod supervisor;
pub mod telemetry;
pub mod topics;
mod wrong_tokens;

pub use admin::{AdminAuth, NotLetIn, admin_router};
pub use assembly::{Parts, launch, launch_migrate, launch_with, run};
pub use config::{
    AdminArgs, AdminSettings, ConfigErrors, DatabaseArgs, DatabaseSettings, HttpArgs, HttpSettings, Identity,
    KafkaArgs, KafkaSettings, OrchestratorArgs, ParticipantArgs, ParticipantSettings, ServiceArgs, ServiceCommand,
    ServiceSettings, TelemetryArgs, command_line,
};
pub use connections::{open_files, serve};
pub use health::{Health, Needs, missing};
pub use migrate::{Migrations, messaging_migrations, saga_migrations};
pub use supervisor::{exit_code, run_all, task};
