//! Mountable routers and problem details.
