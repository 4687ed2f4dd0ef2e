# TorchStable::torch: torch's headers and libraries, used through its stable ABI only. A library
# built against one torch thus loads in any later one. torch is found, never imported: first in the
# build environment, then in the interpreter's own site-packages (-I ignores pip's isolation).
if(NOT TARGET TorchStable::torch)
  foreach(flag "" "-I")
    execute_process(
      COMMAND ${Python_EXECUTABLE} ${flag} -c
              "import importlib.util as u; s = u.find_spec('torch'); print(list(s.submodule_search_locations)[0] if s else '')"
      OUTPUT_VARIABLE TorchStable_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(TorchStable_DIR)
      break()
    endif()
  endforeach()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable REQUIRED_VARS TorchStable_DIR)
if(TorchStable_FOUND AND NOT TARGET TorchStable::torch)
  add_library(TorchStable::torch INTERFACE IMPORTED)
  target_include_directories(TorchStable::torch SYSTEM INTERFACE ${TorchStable_DIR}/include)
  # 2.10, the oldest torch that the binaries load in.
  target_compile_definitions(TorchStable::torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
  target_link_options(TorchStable::torch INTERFACE LINKER:--no-as-needed
                      ${TorchStable_DIR}/lib/libtorch.so ${TorchStable_DIR}/lib/libtorch_cpu.so
                      LINKER:--as-needed)
endif()
