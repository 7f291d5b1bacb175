//! The C++ boundary: the shim, `extern "C"` functions, panic guard, handles.
