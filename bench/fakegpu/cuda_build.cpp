// A device count for a build of torch with CUDA on a machine without a driver (LD_PRELOAD).
//
// FakeTensorMode puts its own guard in place as long as no device is counted; only then may the
// engine of autograd see one.
static signed char count = 0;

extern "C" void smb_pretend() { count = 64; }

namespace c10::cuda {
signed char device_count() noexcept { return count; }
}  // namespace c10::cuda
