// The two functions of libcuda.so.1 that a build of torch with CUDA calls when autograd starts.
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

extern "C" int cuGetErrorString(int, const char** text) {
  *text = "no driver: a pretended GPU";
  return 0;
}
