// CUDA errors as exceptions, device memory and events that free themselves, facts of the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sparseattn/types.h"

namespace bench {

/// Device memory does not suffice: the case is left out, the others go on.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void check(const sparseattn::Status& status, const char* what) {
  if (!status.ok()) throw std::runtime_error(std::string(what) + ": " + status.what);
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "stream"); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "event"); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

/// An array in device memory; `name` says in errors what it is for.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const char* name, int64_t count) : count_(count) {
    if (count == 0) return;
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(count) * sizeof(T));
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: cleared, so that the next launch does not report it
      char text[64];
      std::snprintf(text, sizeof text, "%.2f", static_cast<double>(count) * sizeof(T) / (1 << 30));
      throw OutOfMemory(std::string(name) + ": " + text + " GiB of device memory are not free");
    }
    check(error, name);
    data_ = static_cast<T*>(memory);
  }
  Buffer(const char* name, const std::vector<T>& host, cudaStream_t stream)
      : Buffer(name, static_cast<int64_t>(host.size())) {
    const size_t bytes = host.size() * sizeof(T);
    if (bytes == 0) return;
    check(cudaMemcpyAsync(data_, host.data(), bytes, cudaMemcpyHostToDevice, stream), name);
    check(cudaStreamSynchronize(stream), name);
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }

  T* get() const { return data_; }
  int64_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

/// Pinned memory of the host.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(const char* name, int64_t bytes) : bytes_(bytes) {
    const cudaError_t error =
        cudaHostAlloc(&data_, static_cast<size_t>(bytes), cudaHostAllocMapped);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // not sticky: cleared, so that the next launch does not report it
      throw OutOfMemory(std::string(name) + ": " + std::to_string(bytes >> 20) +
                        " MiB of host memory could not be pinned");
    }
    check(error, name);
  }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) cudaFreeHost(data_);
  }
  void* get() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct DeviceFacts {
  std::string name;
  int multiprocessors = 0;
  int64_t l2_bytes = 0;
  int driver = 0;  // CUDA version that the driver knows: 13000 is 13.0
  int runtime = 0;
};

inline DeviceFacts device_facts() {
  int device = 0, l2 = 0;
  check(cudaGetDevice(&device), "device");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "device");
  check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "device");
  DeviceFacts facts;
  facts.name = properties.name;
  facts.multiprocessors = properties.multiProcessorCount;
  facts.l2_bytes = l2;
  check(cudaDriverGetVersion(&facts.driver), "driver");
  check(cudaRuntimeGetVersion(&facts.runtime), "runtime");
  return facts;
}

}  // namespace bench
