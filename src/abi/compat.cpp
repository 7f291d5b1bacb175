// What the shim's compiler expects of libstdc++ and an older libstdc++ does not have.
//
// A wheel tagged manylinux_2_28 may ask for symbols up to GLIBCXX_3.4.24 (GCC 8). The headers of GCC 11 and newer call this
// function, which came with GLIBCXX_3.4.29, when a vector is asked for more elements than an address space holds.

#include <new>

namespace std {

[[noreturn]] __attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_alloc(); }

} // namespace std
