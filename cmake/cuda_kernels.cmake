# The CUDA kernel library: no torch, static CUDA runtime, machine code per architecture plus PTX.
set(SPARSEATTN_HAS_CUDA OFF)
set(sparseattn_built_architectures "")
set(CUTLASS_VERSION "")
set(sparseattn_no_cuda_reason "nvcc was not found")
if(SPARSEATTN_CUDA STREQUAL "OFF")
  set(sparseattn_no_cuda_reason "SPARSEATTN_CUDA=OFF")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(SPARSEATTN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SPARSEATTN_CUDA=ON, but no nvcc was found")
  endif()
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # flags below, so that one list serves all sources
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "sparseattn needs CUDA 12.4 or newer, found ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
find_package(CUDAToolkit REQUIRED)
find_package(CUTLASS REQUIRED)
set(SPARSEATTN_HAS_CUDA ON)
set(sparseattn_built_architectures ${SPARSEATTN_CUDA_ARCHITECTURES})

set(sparseattn_gencode "")
foreach(arch IN LISTS SPARSEATTN_CUDA_ARCHITECTURES)
  list(APPEND sparseattn_gencode "SHELL:-gencode=arch=compute_${arch},code=sm_${arch}")
endforeach()
# Arch-specific targets (90a) have no forward-compatible PTX: embed that of the lowest plain one.
list(FILTER SPARSEATTN_CUDA_ARCHITECTURES INCLUDE REGEX "^[0-9]+$")
list(SORT SPARSEATTN_CUDA_ARCHITECTURES COMPARE NATURAL)
if(SPARSEATTN_CUDA_ARCHITECTURES)
  list(GET SPARSEATTN_CUDA_ARCHITECTURES 0 lowest)
  list(APPEND sparseattn_gencode "SHELL:-gencode=arch=compute_${lowest},code=compute_${lowest}")
  list(APPEND sparseattn_built_architectures "${lowest}+ptx")
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS
     csrc/attention/sm80/*.cpp csrc/attention/sm80/inst/*.cu
     csrc/index/sm80/*.cpp csrc/index/sm80/*.cu csrc/index/sm80/inst/*.cu)
add_library(sparseattn_cuda_kernels STATIC ${cuda_sources})
target_include_directories(sparseattn_cuda_kernels PUBLIC include PRIVATE csrc)
target_link_libraries(sparseattn_cuda_kernels PUBLIC CUDA::cudart_static PRIVATE CUTLASS::headers)
target_compile_options(
  sparseattn_cuda_kernels
  PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo ${sparseattn_gencode}
          -Xptxas=-v -Xcompiler=-Wall>)
set_target_properties(sparseattn_cuda_kernels PROPERTIES CUDA_VISIBILITY_PRESET hidden)
if(SPARSEATTN_WERROR)
  target_compile_options(sparseattn_cuda_kernels
                         PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
endif()
sparseattn_warnings(sparseattn_cuda_kernels)
