//! CUDA context guard, pointer attributes, dmabuf.
