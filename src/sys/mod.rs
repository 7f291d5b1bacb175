//! Foreign tables loaded at run time: libfabric, hwloc, libcuda. The only foreign struct layouts.
