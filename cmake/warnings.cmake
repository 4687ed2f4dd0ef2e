# Warnings for the project's own code; headers of others are SYSTEM includes.
option(SPARSEATTN_WERROR "Treat warnings as errors" OFF)

function(sparseattn_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  if(SPARSEATTN_WERROR)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
endfunction()
