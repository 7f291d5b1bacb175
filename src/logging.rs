//! The log, driven by `NIXL_LOG_LEVEL`.
