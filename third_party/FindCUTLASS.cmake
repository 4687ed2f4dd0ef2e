# CUTLASS::headers: from SPARSEATTN_CUTLASS_DIR, else, where Python is used, from its nvidia-cutlass
# package, else from where CMake searches headers.
set(CUTLASS_INCLUDE_DIR "${SPARSEATTN_CUTLASS_DIR}")
if(CUTLASS_INCLUDE_DIR AND EXISTS ${CUTLASS_INCLUDE_DIR}/include/cutlass/version.h)
  string(APPEND CUTLASS_INCLUDE_DIR /include)
endif()
if(NOT CUTLASS_INCLUDE_DIR AND NOT SPARSEATTN_PYTHON)
  find_path(sparseattn_cutlass_found cutlass/version.h)
  mark_as_advanced(sparseattn_cutlass_found)
  if(sparseattn_cutlass_found)
    set(CUTLASS_INCLUDE_DIR ${sparseattn_cutlass_found})
  endif()
elseif(NOT CUTLASS_INCLUDE_DIR)
  foreach(flag "" "-I")
    execute_process(
      COMMAND ${Python_EXECUTABLE} ${flag} -c
              "import importlib.util as u; s = u.find_spec('cutlass_library'); print(list(s.submodule_search_locations)[0] + '/source/include' if s else '')"
      OUTPUT_VARIABLE CUTLASS_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(CUTLASS_INCLUDE_DIR)
      break()
    endif()
  endforeach()
endif()
if(CUTLASS_INCLUDE_DIR AND EXISTS ${CUTLASS_INCLUDE_DIR}/cutlass/version.h)
  file(STRINGS ${CUTLASS_INCLUDE_DIR}/cutlass/version.h lines
       REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" lines "${lines}")
  string(REPLACE ";" "." CUTLASS_VERSION "${lines}")
else()
  set(CUTLASS_INCLUDE_DIR "")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  CUTLASS REQUIRED_VARS CUTLASS_INCLUDE_DIR VERSION_VAR CUTLASS_VERSION
  REASON_FAILURE_MESSAGE "set SPARSEATTN_CUTLASS_DIR or (SPARSEATTN_PYTHON=ON) pip install --no-deps nvidia-cutlass")
if(CUTLASS_FOUND AND NOT TARGET CUTLASS::headers)
  add_library(CUTLASS::headers INTERFACE IMPORTED)
  target_include_directories(CUTLASS::headers SYSTEM INTERFACE ${CUTLASS_INCLUDE_DIR})
endif()
