# WSYNC_CUDA: AUTO (default: build the CUDA library if a compiler is found) | ON (fail without one) | OFF
set(WSYNC_CUDA "AUTO" CACHE STRING "Build the CUDA library: AUTO, ON or OFF")
set_property(CACHE WSYNC_CUDA PROPERTY STRINGS AUTO ON OFF)
set(WSYNC_HAVE_CUDA OFF)
if(NOT WSYNC_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # Cubins for Ampere, Hopper and both Blackwells; PTX for whatever lies between and comes later.
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual 100-real 120 CACHE STRING "")
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(WSYNC_HAVE_CUDA ON)
  elseif(WSYNC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "WSYNC_CUDA=ON but no CUDA compiler was found (set CUDACXX)")
  endif()
endif()
message(STATUS "wsync: CUDA library ${WSYNC_HAVE_CUDA} (${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION})")

# Flags of the CUDA library. -fmad=false: a fused multiply-add would change the bits of a quantised weight; the kernels
# fuse where they mean to. Division and square roots are exact by default.
function(wsync_cuda_options target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false -Wno-deprecated-gpu-targets>)
  target_compile_options(${target} PRIVATE $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<CONFIG:Release>>:-O3>)
endfunction()
