// The bindings of one module, in several files.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt4v_fast {

void bind_attention(pybind11::module_& m);
void bind_loss(pybind11::module_& m);
void bind_patch_embed(pybind11::module_& m);

}  // namespace gpt4v_fast
