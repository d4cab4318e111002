// The functions that mkl.h wraps: cblas_sgemm_pack and its kin of oneMKL's developer reference, "BLAS-like extensions".
#include "mkl.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "common.h"

namespace roberta_fast {
namespace {

// cblas.h's values. MKL's integers have 32 bits in PyTorch's builds.
constexpr int ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112, PACKED = 151, RIGHT_FACTOR = 162;
// The rows of x that packing asks for: a hint, as the layout serves any number of them.
constexpr int ROWS = 512;

struct Functions {
  size_t (*size)(int factor, int rows, int columns, int depth) = nullptr;
  void (*pack)(int layout, int factor, int transposed, int rows, int columns, int depth, float alpha, const float* from,
               int stride, float* to) = nullptr;
  void (*compute)(int layout, int transposed_x, int packed, int rows, int columns, int depth, const float* x, int stride_x,
                  const float* weight, int stride_weight, float beta, float* y, int stride_y) = nullptr;

  Functions() {
    // The library that defines a function of PyTorch's for the CPU, and what that is linked against.
    Dl_info torch;
    if (!dladdr(reinterpret_cast<const void*>(&at::get_num_threads), &torch)) return;
    void* library = dlopen(torch.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return;
    size = reinterpret_cast<decltype(size)>(dlsym(library, "cblas_sgemm_pack_get_size"));
    pack = reinterpret_cast<decltype(pack)>(dlsym(library, "cblas_sgemm_pack"));
    compute = reinterpret_cast<decltype(compute)>(dlsym(library, "cblas_sgemm_compute"));
  }
};

const Functions& functions() {
  static const Functions found;
  return found;
}

// W [M, K] as products read it; its numbers mean nothing elsewhere, and a copy of them nothing at all.
at::Tensor prepack(const at::Tensor& weight) {
  TORCH_CHECK_NOT_IMPLEMENTED(mkl_packs(), "this build of PyTorch has no MKL");
  check_float(weight, "weight", 2);
  const at::Tensor rows = with_unit_stride(weight);
  const at::Tensor packed = at::empty({mkl_packed_floats(rows.size(0), rows.size(1))}, weight.options());
  mkl_pack(rows.const_data_ptr<float>(), rows.stride(0), rows.size(0), rows.size(1), packed.mutable_data_ptr<float>());
  return packed;
}

}  // namespace

bool mkl_packs() { return functions().size && functions().pack && functions().compute; }

int64_t mkl_packed_floats(int64_t columns, int64_t depth) {
  const size_t bytes = functions().size(RIGHT_FACTOR, ROWS, static_cast<int>(columns), static_cast<int>(depth));
  return static_cast<int64_t>((bytes + sizeof(float) - 1) / sizeof(float));
}

void mkl_pack(const float* weight, int64_t stride, int64_t columns, int64_t depth, float* packed) {
  functions().pack(ROW_MAJOR, RIGHT_FACTOR, TRANSPOSED, ROWS, static_cast<int>(columns), static_cast<int>(depth), 1.0f, weight,
                   static_cast<int>(stride), packed);
}

void mkl_multiply_packed(const float* x, int64_t stride, const float* packed, int64_t rows, int64_t columns, int64_t depth,
                         float* y) {
  const int m = static_cast<int>(rows), n = static_cast<int>(columns), k = static_cast<int>(depth);
  functions().compute(ROW_MAJOR, AS_IT_IS, PACKED, m, n, k, x, static_cast<int>(stride), packed, n, 0.0f, y, n);
}

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("prepack_is_available() -> bool", TORCH_FN(mkl_packs));
  m.def("prepack(Tensor weight) -> Tensor", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(prepack)));
}

}  // namespace roberta_fast
