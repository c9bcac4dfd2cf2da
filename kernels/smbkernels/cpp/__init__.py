"""C++ implementations for CPUs, built on first use from csrc."""
