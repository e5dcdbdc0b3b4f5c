//! Which callers of an admin listener may do what.

/// What a caller of the admin listener may do. Handlers find it among the request's extensions; it is also who is named
/// in an audit row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// May look.
    Viewer,
    /// May look and act.
    Operator,
}

impl Role {
    /// As it is written into an audit row.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
        }
    }
}
