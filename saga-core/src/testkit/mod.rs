//! What tests need: databases, topics, the explorer, fault injection.
