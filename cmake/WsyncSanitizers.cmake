# WSYNC_SANITIZE: empty (default) or a list for -fsanitize, such as address,undefined or thread.
set(WSYNC_SANITIZE "" CACHE STRING "Sanitizers for the C++ code, as for -fsanitize")
if(WSYNC_SANITIZE)
  add_compile_options(-fsanitize=${WSYNC_SANITIZE} -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${WSYNC_SANITIZE})
endif()
