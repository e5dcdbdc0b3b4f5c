//! A participant: command, decide, reply; fenced, so that a duplicate gets the stored reply.
