// What the bindings check of a kernel's arguments: what would make it touch memory that it does not own.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "args.h"

namespace gpt4v_fast {

inline std::string shape_text(const int64_t* size, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
  return text + ")";
}

// Throws unless `view` is absent or has exactly this shape.
inline void check_shape(const char* name, const View& view, std::initializer_list<int64_t> expected) {
  if (!view.defined) return;
  bool same = view.ndim == static_cast<int>(expected.size());
  for (int i = 0; same && i < view.ndim; ++i) same = view.size[i] == expected.begin()[i];
  if (!same)
    throw std::invalid_argument(std::string(name) + ": expected shape " +
                                shape_text(expected.begin(), static_cast<int>(expected.size())) + ", got " +
                                shape_text(view.size, view.ndim));
}

inline void check_dtype(const char* name, const View& view, std::initializer_list<DType> allowed) {
  if (!view.defined) return;
  for (DType dtype : allowed)
    if (view.dtype == dtype) return;
  throw std::invalid_argument(std::string(name) + ": unexpected dtype code " +
                              std::to_string(static_cast<int>(view.dtype)));
}

inline void check_ndim(const char* name, const View& view, int ndim) {
  if (!view.defined || view.ndim != ndim)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(ndim) + " dimensions, got " +
                                (view.defined ? shape_text(view.size, view.ndim) : std::string("None")));
}

inline void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

inline constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

}  // namespace gpt4v_fast
