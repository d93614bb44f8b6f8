// The patch embedding's part of the bindings.
#include <pybind11/pybind11.h>

#include "binding_checks.h"
#include "bindings.h"
#include "dispatch.h"
#include "python_calls.h"

namespace py = pybind11;

namespace gpt4v_fast {
namespace {

void check_patch_embed(const PatchEmbedArgs& a, int threads) {
  check_threads(threads);
  check_ndim("pixels", a.pixels, 5);
  check_ndim("weight", a.weight, 5);
  check_dtype("pixels", a.pixels, {DType::kUInt8, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_dtype("weight", a.weight, kFloats);
  const int64_t B = a.pixels.size[0], C = a.pixels.size[1], E = a.weight.size[0];
  check_shape("weight", a.weight, {E, C, a.weight.size[2], a.weight.size[3], a.weight.size[4]});
  int64_t N = 1;
  for (int i = 2; i < 5; ++i) {
    if (a.weight.size[i] < 1 || a.pixels.size[i] % a.weight.size[i] != 0)
      throw std::invalid_argument("pixels: expected frames, height and width divisible by the patch, got " +
                                  shape_text(a.pixels.size, 5) + " for weight " + shape_text(a.weight.size, 5));
    N *= a.pixels.size[i] / a.weight.size[i];
  }
  check_shape("bias", a.bias, {E});
  check_dtype("bias", a.bias, kFloats);
  check_shape("pixel_scale", a.pixel_scale, {C});
  check_dtype("pixel_scale", a.pixel_scale, {DType::kFloat32});
  check_shape("pixel_shift", a.pixel_shift, {C});
  check_dtype("pixel_shift", a.pixel_shift, {DType::kFloat32});
  check_shape("pos_embed", a.pos_embed, {N, E});
  check_dtype("pos_embed", a.pos_embed, kFloats);
  check_shape("tokens", a.tokens, {B, N, E});
  check_dtype("tokens", a.tokens, kFloats);
  check_shape("grad_tokens", a.grad_tokens, {B, N, E});
  check_dtype("grad_tokens", a.grad_tokens, kFloats);
  check_shape("grad_weight", a.grad_weight, {E, C, a.weight.size[2], a.weight.size[3], a.weight.size[4]});
  check_dtype("grad_weight", a.grad_weight, {DType::kFloat32});
  int64_t expected = 1;  // the stride of a contiguous tensor
  for (int i = 4; a.grad_weight.defined && i >= 0; --i) {
    const int64_t size = a.grad_weight.size[i];
    if (size > 1 && a.grad_weight.stride[i] != expected)
      throw std::invalid_argument("grad_weight: expected a contiguous tensor");
    expected *= size > 1 ? size : 1;
  }
  check_shape("grad_pixels", a.grad_pixels, {B, C, a.pixels.size[2], a.pixels.size[3], a.pixels.size[4]});
  check_dtype("grad_pixels", a.grad_pixels, kFloats);
}

}  // namespace

void bind_patch_embed(py::module_& m) {
  m.def("read_patch_embed_calls", &CallReader<PatchEmbedArgs>::install, py::arg("fields"));
  m.def("patch_embed_forward", [](const py::tuple& call, View tokens, int threads) {
    PatchEmbedArgs a = CallReader<PatchEmbedArgs>::read(call);
    a.tokens = tokens;
    check_patch_embed(a, threads);
    py::gil_scoped_release release;
    kernels().patch_embed_forward(a, threads);
  });
  m.def("patch_embed_backward",
        [](const py::tuple& call, View grad_tokens, View grad_weight, View grad_pixels, int threads) {
          PatchEmbedArgs a = CallReader<PatchEmbedArgs>::read(call);
          a.grad_tokens = grad_tokens, a.grad_weight = grad_weight, a.grad_pixels = grad_pixels;
          check_patch_embed(a, threads);
          py::gil_scoped_release release;
          kernels().patch_embed_backward(a, threads);
        });
}

}  // namespace gpt4v_fast
