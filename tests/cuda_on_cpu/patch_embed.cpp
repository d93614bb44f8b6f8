// Runs csrc/cuda/patch_embed.cu on the CPU: patch_embed CASE RESULT forward|backward.
//
// CASE: 29 int64 (see main), then the bytes of pixels' storage, weight, pixel_scale, pixel_shift, bias, pos_embed; an
// absent tensor has dtype -1 and no bytes. RESULT gets the bytes of tokens. Every tensor is a heap block of exactly its
// size, so that AddressSanitizer sees any access outside of it.
#include "cuda/patch_embed.cu"

#include <cstring>
#include <fstream>
#include <string>

namespace {

struct Storage {
  explicit Storage(int64_t bytes) : bytes(bytes), data(static_cast<char*>(std::malloc(static_cast<size_t>(bytes)))) {}
  ~Storage() { std::free(data); }
  int64_t bytes;
  char* data;
};

int64_t read_int(std::istream& in) {
  int64_t value = 0;
  in.read(reinterpret_cast<char*>(&value), sizeof(value));
  return value;
}

void read_ints(std::istream& in, int64_t* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = read_int(in);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::ifstream in(argv[1], std::ios::binary);
  const bool backward = std::string(argv[3]) == "backward";
  cuda_on_cpu::order = backward ? cuda_on_cpu::Order::kBackward : cuda_on_cpu::Order::kForward;
  int64_t dtypes[5], starts[2], sizes[5], strides[5], weight_sizes[5], token_bytes, bytes[6];
  read_ints(in, dtypes, 5);  // pixels, weight, bias, pos_embed, tokens
  read_ints(in, starts, 2);  // bytes from the storage's begin to the first element: pixels, weight
  read_ints(in, sizes, 5);
  read_ints(in, strides, 5);
  read_ints(in, weight_sizes, 5);
  read_ints(in, &token_bytes, 1);
  read_ints(in, bytes, 6);
  Storage pixels(bytes[0]), weight(bytes[1]), scale(bytes[2]), shift(bytes[3]), bias(bytes[4]), pos(bytes[5]);
  for (Storage* storage : {&pixels, &weight, &scale, &shift, &bias, &pos}) in.read(storage->data, storage->bytes);
  if (!in) return 2;
  Storage tokens(token_bytes);
  std::memset(tokens.data, 0xff, static_cast<size_t>(token_bytes));
  const cudaError_t error = gpt4v_fast_patch_embed_forward(
      pixels.data + starts[0], static_cast<int32_t>(dtypes[0]), sizes, strides, weight.data + starts[1],
      static_cast<int32_t>(dtypes[1]), weight_sizes, dtypes[2] < 0 ? nullptr : bias.data,
      static_cast<int32_t>(dtypes[2]), reinterpret_cast<const float*>(scale.data),
      reinterpret_cast<const float*>(shift.data), dtypes[3] < 0 ? nullptr : pos.data, static_cast<int32_t>(dtypes[3]),
      tokens.data, static_cast<int32_t>(dtypes[4]), nullptr);
  if (error != cudaSuccess) return 4;
  std::ofstream(argv[2], std::ios::binary).write(tokens.data, token_bytes);
  return 0;
}
