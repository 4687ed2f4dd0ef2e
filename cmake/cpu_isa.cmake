# The numeric loops are compiled once per instruction set and chosen at run time.
set(sparseattn_cpu_isa generic)
set_source_files_properties(csrc/common/cpu/kernels_generic.cpp PROPERTIES COMPILE_OPTIONS -O3)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set_source_files_properties(csrc/common/cpu/kernels_avx2.cpp
                              PROPERTIES COMPILE_OPTIONS "-O3;-mavx2;-mfma")
  set_source_files_properties(csrc/common/cpu/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
                              "-O3;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma")
  list(APPEND sparseattn_cpu_isa avx2 avx512)
endif()
