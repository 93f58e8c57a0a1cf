// What the C++ tests share: a check that says what is wrong, and exact sums to compare with.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

// Stops the test unless `condition` holds; the rest is printf's.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)
