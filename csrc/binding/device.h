// What a binding of CUDA operators needs of torch: the current stream, the device guard, pointers.
//
// WSCL_SIMULATED (a test's build) puts CPU tensors in the place of CUDA ones: there is one stream, no device to
// guard, and memory is made known to the simulator before a kernel sees it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensors.h"

#ifdef WSCL_SIMULATED
#include <vector>

extern "C" void ptxsim_register_ex(void* memory, size_t bytes, const char* name, unsigned flags);
extern "C" void ptxsim_unregister(void* memory);
#endif

namespace wscl::binding {

#ifdef WSCL_SIMULATED
// What the simulator was told of; a test has it forgotten before others use the same memory.
inline std::vector<void*>& simulated_memory() {
  static std::vector<void*> memory;
  return memory;
}
extern "C" __attribute__((weak, visibility("default"))) void wscl_forget_tensors() {
  for (void* memory : simulated_memory()) ptxsim_unregister(memory);
  simulated_memory().clear();
}
#endif

#ifndef WSCL_SIMULATED
// Torch's CUDA library has it, in builds with CUDA alone; its header asks for that to be told by a macro.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// The tensor's device is the current one while this lives.
struct DeviceScope {
#ifdef WSCL_SIMULATED
  cudaStream_t stream = nullptr;
  explicit DeviceScope(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  explicit DeviceScope(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
#endif
};

// Where kernels find a tensor's numbers.
template <class T>
T* device_data(const Tensor& tensor, int64_t element_size = sizeof(T)) {
  void* memory = tensor.data_ptr();
#ifdef WSCL_SIMULATED
  if (tensor.numel()) {
    const int64_t last =
        tensor.dim() == 2 ? (tensor.size(0) - 1) * tensor.stride(0) + tensor.size(1) : tensor.numel();
    ptxsim_unregister(memory);
    ptxsim_register_ex(memory, static_cast<size_t>(last * element_size), "tensor", 0);
    simulated_memory().push_back(memory);
  }
#else
  (void)element_size;
#endif
  return static_cast<T*>(memory);
}

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

}  // namespace wscl::binding
