// What the executables' main functions have in common.
#pragma once

#include <cstdio>
#include <exception>

#include "options.h"

namespace bench {

/// Parses, then runs `body(options)`; exit status 2 where the user can put it right, else 1.
template <class Body>
int run_main(const char* program, Options& options, int argc, char** argv, const Body& body) {
  try {
    options.parse(argc, argv);
    if (options.on("help")) {
      options.print_help();
      return 0;
    }
    body(options);
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.what());
    return 1;
  }
}

}  // namespace bench
