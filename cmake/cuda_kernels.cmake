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

function(sparseattn_cuda_options target gencode)
  target_include_directories(${target} PRIVATE csrc)
  target_link_libraries(${target} PRIVATE CUTLASS::headers PUBLIC CUDA::cudart_static)
  target_compile_options(
    ${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo ${gencode}
                      -Xptxas=-v -Xcompiler=-Wall>)
  set_target_properties(${target} PROPERTIES CUDA_VISIBILITY_PRESET hidden)
  if(SPARSEATTN_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
  sparseattn_warnings(${target})
endfunction()

file(GLOB cuda_sources CONFIGURE_DEPENDS
     csrc/attention/*.cpp csrc/attention/sm80/*.cpp csrc/attention/sm80/inst/*.cu
     csrc/index/sm80/*.cpp csrc/index/sm80/*.cu csrc/index/sm80/inst/*.cu
     csrc/shadow/sm80/*.cpp csrc/shadow/sm80/*.cu csrc/shadow/sm80/inst/*.cu)
file(GLOB sm90_sources CONFIGURE_DEPENDS
     csrc/attention/sm90/*.cpp csrc/attention/sm90/*.cu csrc/attention/sm90/inst/*.cu)
add_library(sparseattn_cuda_kernels STATIC ${cuda_sources})
target_include_directories(sparseattn_cuda_kernels PUBLIC include)
sparseattn_cuda_options(sparseattn_cuda_kernels "${sparseattn_gencode}")

if("90a" IN_LIST sparseattn_built_architectures)
  # The Hopper kernels exist for that architecture alone.
  add_library(sparseattn_sm90_kernels OBJECT ${sm90_sources})
  target_include_directories(sparseattn_sm90_kernels PRIVATE include)
  # One lane of a warp arrives on a barrier for all of them, which racecheck does not follow.
  option(SPARSEATTN_RACECHECK "Kernels whose barriers compute-sanitizer's racecheck understands" OFF)
  if(SPARSEATTN_RACECHECK)
    target_compile_definitions(sparseattn_sm90_kernels PRIVATE SPARSEATTN_RACECHECK)
  endif()
  sparseattn_cuda_options(sparseattn_sm90_kernels "SHELL:-gencode=arch=compute_90a,code=sm_90a")
  target_sources(sparseattn_cuda_kernels PRIVATE $<TARGET_OBJECTS:sparseattn_sm90_kernels>)
  target_compile_definitions(sparseattn_cuda_kernels PRIVATE SPARSEATTN_HAS_SM90)
endif()
