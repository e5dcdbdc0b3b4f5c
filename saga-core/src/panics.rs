//! The text of a panic. Pure. Where a service's own code runs among others' work, a panic is that one piece of work's
//! error.

use std::any::Any;

/// The panic's message, if it had one.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
