//! One method for each NIXL call.
