// Which attention kernel a device runs.
#include "common/cuda/launch.h"
#include "sparseattn/attention.h"

namespace sparseattn {

AttentionPath attention_path(int major, int minor) {
#ifdef SPARSEATTN_HAS_SM90
  if (major == 9 && minor == 0) return AttentionPath::kSm90;
#endif
  static_cast<void>(major);
  static_cast<void>(minor);
  return AttentionPath::kSm80;
}

Status sparse_attention(const AttentionParams& params, cudaStream_t stream) {
  int device = 0, major = 0, minor = 0;
  Status status = cuda::to_status(cudaGetDevice(&device));
  if (!status.ok()) return status;
  status =
      cuda::to_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (!status.ok()) return status;
  status =
      cuda::to_status(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (!status.ok()) return status;
#ifdef SPARSEATTN_HAS_SM90
  if (attention_path(major, minor) == AttentionPath::kSm90) {
    return sparse_attention_sm90(params, stream);
  }
#endif
  return sparse_attention_sm80(params, stream);
}

#ifndef SPARSEATTN_HAS_SM90
Status sparse_attention_sm90(const AttentionParams&, cudaStream_t) {
  return {1, "sparse_attention_sm90: not in this build (architecture 90a was not asked for)"};
}
#endif

}  // namespace sparseattn
