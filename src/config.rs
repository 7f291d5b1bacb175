//! Every option: key, environment variable, default, range, help.
