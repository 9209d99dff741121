# What every target of the project shares: language level, warnings, sanitizers.
#
#   pbs_add_library(NAME [EXCEPTIONS] [NO_UBSAN] SOURCES ...)
#                                                    static library pbs_NAME, alias pbs::NAME
#   pbs_set_target_defaults(TARGET [EXCEPTIONS] [NO_UBSAN])
#                                                    the same options for any target
#
# Our code throws nothing and is built with -fno-exceptions. EXCEPTIONS marks targets
# whose libraries (oneTBB, oneDNN, CLI11) throw; they catch at their own edge.
#
# NO_UBSAN leaves UndefinedBehaviorSanitizer out: it doubles compile time, and tests,
# generated code and the oracle are not what it is to look at.
include_guard(GLOBAL)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "Build type" FORCE)
endif()

# OFF, so that a compiler that nobody tried builds it all the same; ON in CI and in the
# presets of those who change the code.
option(PBS_WERROR "Warnings are errors" OFF)

find_program(PBS_CCACHE ccache)
if(PBS_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${PBS_CCACHE})
endif()

function(pbs_set_target_defaults target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "EXCEPTIONS;NO_UBSAN" "" "")
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow
                         $<$<BOOL:${PBS_WERROR}>:-Werror>)
  # GCC 12 sees copies that overlap where a literal is joined with a string (its bug
  # 105651): whether it does hangs on what it inlines.
  if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
  endif()
  if(NOT arg_EXCEPTIONS)
    target_compile_options(${target} PRIVATE -fno-exceptions)
  endif()
  pbs_sanitize(${target} "${arg_NO_UBSAN}")
endfunction()

function(pbs_sanitize target no_ubsan)
  if(NOT PBS_SANITIZER)
    return()
  endif()
  list(JOIN PBS_SANITIZER "," sanitizers)
  target_link_options(${target} PUBLIC -fsanitize=${sanitizers})
  set(compiled ${PBS_SANITIZER})
  if(no_ubsan)
    list(REMOVE_ITEM compiled undefined)
  endif()
  if(compiled)
    list(JOIN compiled "," sanitizers)
    target_compile_options(${target} PRIVATE -fsanitize=${sanitizers}
                           -fno-sanitize-recover=all -fno-omit-frame-pointer)
  endif()
endfunction()

function(pbs_add_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "EXCEPTIONS;NO_UBSAN" "" "SOURCES")
  add_library(pbs_${name} STATIC ${arg_SOURCES})
  add_library(pbs::${name} ALIAS pbs_${name})
  set(options "")
  foreach(option EXCEPTIONS NO_UBSAN)
    if(arg_${option})
      list(APPEND options ${option})
    endif()
  endforeach()
  pbs_set_target_defaults(pbs_${name} ${options})
endfunction()
