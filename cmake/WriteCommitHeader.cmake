# Writes HEADER, which defines PBS_COMMIT: COMMIT if that is given, else what git says of
# SOURCE_DIR, else "unknown". A header that says so already is left alone, and nothing is
# built again.
#
#   cmake -DHEADER=FILE -DSOURCE_DIR=FOLDER [-DCOMMIT=NAME] -P WriteCommitHeader.cmake
cmake_minimum_required(VERSION 3.25)
if(NOT COMMIT)
  execute_process(COMMAND git -C ${SOURCE_DIR} rev-parse --short=12 HEAD
                  OUTPUT_VARIABLE COMMIT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT COMMIT)
  set(COMMIT unknown)
endif()
file(CONFIGURE OUTPUT "${HEADER}" CONTENT "#define PBS_COMMIT \"@COMMIT@\"\n" @ONLY)
