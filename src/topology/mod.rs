//! Machine model and rail selection.
