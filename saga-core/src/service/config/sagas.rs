//! The settings of services that run sagas, or take part in them.

use super::{ConfigErrors, given, nth};
use crate::topic::is_legal_name;
use clap::Args;

/// What a participant in sagas takes beside.
#[derive(Debug, Clone, Default, Args)]
pub struct ParticipantArgs {
    /// Topics that commands may have their replies sent to beside the platform's own, several separated by commas
    #[arg(long, env = "REPLY_TOPICS", value_name = "TOPIC,...", hide_env_values = true, global = true)]
    pub reply_topics: Option<String>,
    /// Sources (`ce_source`) whose commands are taken beside those of the platform's own orchestrators, several separated by commas
    #[arg(long, env = "COMMAND_SOURCES", value_name = "SOURCE,...", hide_env_values = true, global = true)]
    pub command_sources: Option<String>,
}

/// What a service that runs sagas takes beside.
#[derive(Debug, Clone, Default, Args)]
pub struct OrchestratorArgs {
    /// Sources (`ce_source`) whose replies are taken beside those of the platform's own participants, several separated by commas
    #[arg(long, env = "REPLY_SOURCES", value_name = "SOURCE,...", hide_env_values = true, global = true)]
    pub reply_sources: Option<String>,
}

/// The settings of a valid [`ParticipantArgs`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParticipantSettings {
    /// The topics that replies may go to, beside the platform's own.
    pub reply_topics: Vec<String>,
    /// The sources whose commands are taken, beside the platform's own.
    pub command_sources: Vec<String>,
}

impl ParticipantArgs {
    /// Reads the arguments, and adds each mistake to `errors`.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<ParticipantSettings> {
        let topics = listed(&self.reply_topics);
        let reply_topics = match topics.iter().position(|topic| !is_legal_name(topic)) {
            Some(wrong) => {
                let wrong = nth(wrong, "is no name of a topic that can be written to");
                errors.add("REPLY_TOPICS", wrong, "name topics, separated by commas")
            }
            None => Some(topics),
        };
        let command_sources = sources(&self.command_sources, "COMMAND_SOURCES", errors);
        Some(ParticipantSettings { reply_topics: reply_topics?, command_sources: command_sources? })
    }
}

impl OrchestratorArgs {
    /// Reads the sources, and adds each mistake to `errors`.
    pub fn read(&self, errors: &mut ConfigErrors) -> Option<Vec<String>> {
        sources(&self.reply_sources, "REPLY_SOURCES", errors)
    }
}

fn listed(text: &Option<String>) -> Vec<String> {
    let parts = given(text).unwrap_or_default().split(',').map(str::trim);
    parts.filter(|part| !part.is_empty()).map(ToOwned::to_owned).collect()
}

fn sources(text: &Option<String>, variable: &'static str, errors: &mut ConfigErrors) -> Option<Vec<String>> {
    let listed = listed(text);
    match listed.iter().position(|source| source.chars().any(|c| c.is_whitespace() || c.is_control())) {
        Some(wrong) => errors.add(variable, nth(wrong, "has a blank in it"), "name sources, separated by commas"),
        None => Some(listed),
    }
}
