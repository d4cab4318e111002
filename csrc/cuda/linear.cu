// y = x W^T + b (+ residual) by cuBLASLt, for rows whose number the host knows; contract in roberta_fast/ops/linear.py.
// The residual is the C of D = A B + C, a matrix of its own: torch.addmm would first copy it to where y goes.
// cuBLASLt's matrices have their columns in one piece, so it computes y^T = W x^T, and b runs along the columns of that.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace roberta_fast {
namespace {

constexpr size_t WORKSPACE_LIMIT = 32 << 20;  // what NVIDIA advises for Hopper
constexpr size_t CACHE_LIMIT = 4096;          // products whose algorithm is remembered

// The functions of the library that PyTorch has loaded: so the extension is linked against none, and there is one in the process.
struct Library {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtMatmulDescCreate) description_create;
  decltype(&cublasLtMatmulDescDestroy) description_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) description_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmul) multiply;

  Library() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* library = dlopen(name.c_str(), RTLD_LAZY);
    TORCH_CHECK(library, "roberta_fast: ", name, " does not load: ", dlerror());
    const auto find = [&](auto& function, const char* symbol) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
      TORCH_CHECK(function, "roberta_fast: ", name, " has no ", symbol);
    };
    find(create, "cublasLtCreate");
    find(description_create, "cublasLtMatmulDescCreate");
    find(description_destroy, "cublasLtMatmulDescDestroy");
    find(description_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(multiply, "cublasLtMatmul");
  }
};

const Library& library() {
  static const Library found;
  return found;
}

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "roberta_fast: ", what, " failed with cuBLAS status ", static_cast<int>(status));
}

// An opaque object of the library's, destroyed with its owner.
template <class Opaque>
using Owned = std::unique_ptr<Opaque, cublasStatus_t (*)(Opaque*)>;

using Description = Owned<cublasLtMatmulDescOpaque_t>;
using Layout = Owned<cublasLtMatrixLayoutOpaque_t>;
using Preference = Owned<cublasLtMatmulPreferenceOpaque_t>;

Layout layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride) {
  cublasLtMatrixLayout_t made = nullptr;
  check(library().layout_create(&made, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), stride),
        "cublasLtMatrixLayoutCreate");
  return {made, library().layout_destroy};
}

template <class Value>
void set(const Description& description, cublasLtMatmulDescAttributes_t attribute, Value value) {
  check(library().description_set(description.get(), attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute");
}

template <class Value>
void set(const Preference& preference, cublasLtMatmulPreferenceAttributes_t attribute, Value value) {
  check(library().preference_set(preference.get(), attribute, &value, sizeof(value)), "cublasLtMatmulPreferenceSetAttribute");
}

// A handle for each device; they last as long as the process.
cublasLtHandle_t handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle) check(library().create(&handle), "cublasLtCreate");
  return handle;
}

cudaDataType_t data_type(at::ScalarType type) {
  return type == at::kBFloat16 ? CUDA_R_16BF : type == at::kHalf ? CUDA_R_16F : CUDA_R_32F;
}

// The largest power of two up to 256 that divides an address.
uint32_t alignment(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return address ? static_cast<uint32_t>(std::min<uintptr_t>(256, address & (~address + 1))) : 256;
}

// A matrix whose rows may be farther apart than they are long, but each in one piece; a copy only of another.
at::Tensor with_whole_rows(const at::Tensor& t) {
  const bool whole = t.size(1) <= 1 || t.stride(1) == 1;
  return whole && (t.size(0) <= 1 || t.stride(0) >= t.size(1)) ? t : t.contiguous();
}

// From one row to the next; of a single one the tensor may say anything.
int64_t row_stride(const at::Tensor& t) { return t.size(0) <= 1 ? t.size(1) : t.stride(0); }

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 14>;

struct Algorithm {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace;
};

struct Product {
  cublasLtHandle_t handle;
  Description description;
  Layout weight, x, residual, y;
  Key key;
  std::array<uint32_t, 4> alignments;  // of weight, x, residual, y

  Algorithm algorithm() const {
    static std::mutex mutex;
    static std::map<Key, Algorithm> known;
    const std::lock_guard lock(mutex);
    if (const auto found = known.find(key); found != known.end()) return found->second;
    // Numbers of rows come and go; those in use are soon back.
    if (known.size() >= CACHE_LIMIT) known.clear();
    return known[key] = choose();
  }

  Algorithm choose() const {
    cublasLtMatmulPreference_t made = nullptr;
    check(library().preference_create(&made), "cublasLtMatmulPreferenceCreate");
    const Preference preference(made, library().preference_destroy);
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{WORKSPACE_LIMIT});
    // Where the sum is divided, its parts are added in float32.
    set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignments[0]);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignments[1]);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignments[2]);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignments[3]);
    cublasLtMatmulHeuristicResult_t result{};
    int number = 0;
    check(library().heuristic(handle, description.get(), weight.get(), x.get(), residual.get(), y.get(), preference.get(), 1,
                              &result, &number),
          "cublasLtMatmulAlgoGetHeuristic");
    TORCH_CHECK(number > 0, "roberta_fast: cuBLASLt has no algorithm for this product");
    return {result.algo, result.workspaceSize};
  }
};

void check_operand(const at::Tensor& t, const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, " must have shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type() && t.device() == x.device(), name, " must be ", x.scalar_type(), " on ",
                    x.device(), ", got ", t.scalar_type(), " on ", t.device());
}

at::Tensor linear_fwd(const at::Tensor& given_x, const at::Tensor& given_weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& given_residual, const std::optional<at::Tensor>& count, bool deterministic,
                      const std::optional<at::Tensor>& packed) {
  const at::ScalarType type = given_x.scalar_type();
  TORCH_CHECK_VALUE(given_x.dim() == 2, "x must be [N, K], got shape ", given_x.sizes());
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
                    "x must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(!count.has_value(), "count must be None: cuBLASLt takes the number of rows from the host");
  TORCH_CHECK_VALUE(!deterministic, "deterministic must be False: cuBLASLt chooses by the number of rows");
  TORCH_CHECK_VALUE(!packed.has_value(), "packed must be None: it is MKL's layout");
  TORCH_CHECK_VALUE(given_weight.dim() == 2, "weight must be [M, K], got shape ", given_weight.sizes());
  const int64_t n = given_x.size(0), k = given_x.size(1), m = given_weight.size(0);
  check_operand(given_weight, "weight", given_x, {m, k});
  if (bias.has_value()) check_operand(*bias, "bias", given_x, {m});
  if (given_residual.has_value()) check_operand(*given_residual, "residual", given_x, {n, m});

  const c10::cuda::CUDAGuard guard(given_x.device());
  const at::Tensor y = at::empty({n, m}, given_x.options());
  if (y.numel() == 0) return y;
  if (k == 0) {
    given_residual.has_value() ? y.copy_(*given_residual) : y.zero_();
    return bias.has_value() ? y.add_(*bias) : y;
  }
  const at::Tensor x = with_whole_rows(given_x), weight = with_whole_rows(given_weight);
  at::Tensor vector = bias.has_value() ? bias->contiguous() : at::Tensor();
  // Of the bias no alignment can be told: it has the one that vector loads want.
  if (vector.defined() && alignment(vector.const_data_ptr()) < 16) vector = vector.clone();
  // Without a residual nothing of C is read.
  const at::Tensor residual = given_residual.has_value() ? with_whole_rows(*given_residual) : y;

  // allowTF32CuBLAS() throws where it was set by fp32_precision alone.
  const bool tf32 = type == at::kFloat && at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                                              at::Float32Precision::TF32;
  cublasLtMatmulDesc_t made = nullptr;
  check(library().description_create(&made, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "cublasLtMatmulDescCreate");
  Description description(made, library().description_destroy);
  set(description, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (bias.has_value()) {
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector.const_data_ptr());
  }
  const cudaDataType_t data = data_type(type);
  const std::array<uint32_t, 4> alignments{alignment(weight.const_data_ptr()), alignment(x.const_data_ptr()),
                                           alignment(residual.const_data_ptr()), alignment(y.const_data_ptr())};
  const int device = given_x.get_device();
  const Key key{device,
                data,
                tf32,
                n,
                m,
                k,
                row_stride(x),
                row_stride(weight),
                row_stride(residual),
                bias.has_value() + 2 * given_residual.has_value(),
                alignments[0],
                alignments[1],
                alignments[2],
                alignments[3]};
  const Product product{handle_of(device),
                        std::move(description),
                        layout(data, k, m, row_stride(weight)),
                        layout(data, k, n, row_stride(x)),
                        layout(data, m, n, row_stride(residual)),
                        layout(data, m, n, m),
                        key,
                        alignments};
  const Algorithm algorithm = product.algorithm();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // Freed at the end of this function, and given to nobody else on this stream before the product is done.
  const c10::DataPtr workspace = c10::cuda::CUDACachingAllocator::get()->allocate(algorithm.workspace);
  const float one = 1, of_residual = given_residual.has_value() ? 1 : 0;
  check(library().multiply(product.handle, product.description.get(), &one, weight.const_data_ptr(), product.weight.get(),
                           x.const_data_ptr(), product.x.get(), &of_residual, residual.const_data_ptr(), product.residual.get(),
                           y.mutable_data_ptr(), product.y.get(), &algorithm.algorithm, workspace.get(), algorithm.workspace,
                           stream),
        "cublasLtMatmul");
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(roberta_fast_cpp, CUDA, m) { m.impl("linear_fwd", TORCH_FN(linear_fwd)); }

}  // namespace roberta_fast
