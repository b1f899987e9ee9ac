# Flags of all C++ targets. No -march here: the wide kernels carry target attributes of their own and are chosen at run time.
# -ffp-contract=off: a fused multiply-add would change the bits of a quantised weight.
function(wsync_compile_options target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -ffp-contract=off)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O3>)
endfunction()
