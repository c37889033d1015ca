// Lets the library load with the glibc of torch's own wheels, 2.28, when it is compiled on a later one.
//
// std::shared_ptr of libstdc++ reads this variable, which came with glibc 2.32, to count without atomic instructions where
// there is one thread. With a definition of our own, hidden, the library does not look for glibc's. See also `log2`.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
