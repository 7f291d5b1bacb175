//! Safe owning wrappers of libfabric objects.
