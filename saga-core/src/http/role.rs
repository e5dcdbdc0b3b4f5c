//! The roles of an admin listener's callers.

/// What a caller of the admin listener may do. Handlers find it among the request's extensions. An audit row names it
/// as the actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The caller may look: GET and HEAD.
    Viewer,
    /// The caller may look and act.
    Operator,
}

impl Role {
    /// The name that is written into an audit row.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
        }
    }
}
