// Where the real tokens of a padded batch are, in one launch; contract of pack_indices in roberta_fast/ops/pack.py.
// The blocks fit the device together. They first count each sequence's tokens, wait for one another, and then read all counts:
// so each knows where its sequences begin and where they stand among all by length.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

namespace roberta_fast {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr unsigned EVERY_LANE = 0xFFFFFFFF;

// A mask whose elements are read as integers of their size; significant: the bits of which one is set in what is not zero.
template <class Bits>
struct Mask {
  const Bits* data;
  int64_t stride_b, stride_s;
  Bits significant;

  __device__ bool is_real(int64_t b, int64_t s) const { return (data[b * stride_b + s * stride_s] & significant) != 0; }
  __device__ bool is_kept(int64_t b, int64_t s) const { return s == 0 || is_real(b, s); }
};

struct Sizes {
  int64_t batch, seqlen, rows;
};

struct Outputs {
  int64_t* indices;     // [rows]
  int32_t* cu_seqlens;  // [batch + 1]
  int32_t* count;       // [1]
  int32_t* query_only;  // [batch]
  int32_t* order;       // [batch]
  int32_t* lengths;     // [batch], scratch
};

// The sum of each value over the block, for all of its threads.
template <int VALUES>
__device__ void sum_over_block(int64_t (&values)[VALUES]) {
  __shared__ int64_t sums[VALUES][WARPS];
  __syncthreads();  // the sums before these may still be read
  for (int v = 0; v < VALUES; ++v) {
    for (int lanes = 16; lanes > 0; lanes /= 2) values[v] += __shfl_xor_sync(EVERY_LANE, values[v], lanes);
    if (threadIdx.x % 32 == 0) sums[v][threadIdx.x / 32] = values[v];
  }
  __syncthreads();
  for (int v = 0; v < VALUES; ++v) {
    values[v] = 0;
    for (int warp = 0; warp < WARPS; ++warp) values[v] += sums[v][warp];
  }
}

// Writes the positions of sequence b's tokens from slot `begin` on, in order; what does not fit is left out.
template <class Bits>
__device__ void write_positions(const Mask<Bits>& mask, const Sizes& sizes, int64_t b, int64_t begin, int64_t* indices) {
  __shared__ int kept_in_warp[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t first = 0; first < sizes.seqlen; first += THREADS) {
    const int64_t s = first + threadIdx.x;
    const bool kept = s < sizes.seqlen && mask.is_kept(b, s);
    const unsigned lanes = __ballot_sync(EVERY_LANE, kept);
    if (lane == 0) kept_in_warp[warp] = __popc(lanes);
    __syncthreads();
    int64_t slot = begin + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; ++w) {
      slot += w < warp ? kept_in_warp[w] : 0;
      begin += kept_in_warp[w];
    }
    if (kept && slot < sizes.rows) indices[slot] = b * sizes.seqlen + s;
    __syncthreads();
  }
}

template <class Bits>
__global__ void __launch_bounds__(THREADS) pack_indices_kernel(Mask<Bits> mask, Sizes sizes, Outputs out) {
  for (int64_t b = blockIdx.x; b < sizes.batch; b += gridDim.x) {
    int64_t length[1] = {0};
    for (int64_t s = threadIdx.x; s < sizes.seqlen; s += THREADS) length[0] += mask.is_kept(b, s);
    sum_over_block(length);
    if (threadIdx.x == 0) {
      out.lengths[b] = static_cast<int32_t>(length[0]);
      out.query_only[b] = !mask.is_real(b, 0);
    }
  }
  cooperative_groups::this_grid().sync();
  int64_t total = 0;
  for (int64_t b = blockIdx.x; b < sizes.batch; b += gridDim.x) {
    const int32_t mine = out.lengths[b];
    int64_t sums[3] = {0, 0, 0};  // tokens before this sequence, tokens in all, and sequences that stand before it by length
    for (int64_t other = threadIdx.x; other < sizes.batch; other += THREADS) {
      const int32_t length = out.lengths[other];
      sums[0] += other < b ? length : 0;
      sums[1] += length;
      sums[2] += length > mine || (length == mine && other < b);
    }
    sum_over_block(sums);
    total = sums[1];
    if (threadIdx.x == 0) {
      out.cu_seqlens[b] = static_cast<int32_t>(sums[0]);
      out.order[sums[2]] = static_cast<int32_t>(b);
      if (b == sizes.batch - 1) {
        out.cu_seqlens[sizes.batch] = *out.count = static_cast<int32_t>(total);
        CUDA_KERNEL_ASSERT(total <= sizes.rows && "mask has more real tokens than capacity");
      }
    }
    write_positions(mask, sizes, b, sums[0], out.indices);
  }
  // Every block has had a sequence, hence knows the total.
  const int64_t threads = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t slot = total + blockIdx.x * THREADS + threadIdx.x; slot < sizes.rows; slot += threads)
    out.indices[slot] = sizes.batch * sizes.seqlen;
}

// How many blocks of the kernel fit the current device together.
template <class Bits>
int blocks_that_fit() {
  constexpr int DEVICES = 64;
  static std::atomic<int> known[DEVICES];
  const int device = c10::cuda::current_device();
  TORCH_CHECK(device < DEVICES, "device ", device, " is beyond the ", DEVICES, " that are served");
  int blocks = known[device].load(std::memory_order_relaxed);
  if (blocks == 0) {
    int processors = 0, on_each = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, pack_indices_kernel<Bits>, THREADS, 0));
    blocks = processors * on_each;
    known[device].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <class Bits>
void launch(const at::Tensor& mask, Sizes sizes, Outputs out) {
  Bits significant = static_cast<Bits>(~Bits{0});
  // Minus zero is zero: of a float all bits but the sign count, of a complex number of two floats those of both.
  if (at::isFloatingType(mask.scalar_type())) significant = static_cast<Bits>(significant >> 1);
  if (at::isComplexType(mask.scalar_type())) significant = static_cast<Bits>(sizeof(Bits) == 8 ? 0x7FFFFFFF7FFFFFFF : 0x7FFF7FFF);
  Mask<Bits> bits{static_cast<const Bits*>(mask.const_data_ptr()), mask.stride(0), mask.stride(1), significant};
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(sizes.batch, blocks_that_fit<Bits>()));
  void* arguments[] = {&bits, &sizes, &out};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(pack_indices_kernel<Bits>, dim3(blocks), dim3(THREADS), arguments, 0,
                                             c10::cuda::getCurrentCUDAStream()));
}

// (indices, cu_seqlens, count, query_only, order). order: int32 [B], the sequences by descending length, ties by ascending index.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_indices(const at::Tensor& given,
                                                                                    std::optional<int64_t> capacity) {
  TORCH_CHECK_VALUE(given.dim() == 2 && given.size(1) >= 1, "mask must be [B, S] with S >= 1, got shape ", given.sizes());
  TORCH_CHECK_VALUE(given.numel() < std::numeric_limits<int32_t>::max(), "mask must have less than 2^31 elements, got shape ",
                    given.sizes());
  const c10::cuda::CUDAGuard guard(given.device());
  const at::Tensor mask = given.element_size() > 8 ? given.ne(0) : given;
  const Sizes sizes{mask.size(0), mask.size(1), capacity.value_or(mask.numel())};
  const auto ints = mask.options().dtype(at::kInt);
  const at::Tensor indices = at::empty({sizes.rows}, mask.options().dtype(at::kLong));
  const at::Tensor cu_seqlens = at::empty({sizes.batch + 1}, ints), count = at::empty({1}, ints);
  const at::Tensor query_only = at::empty({sizes.batch}, ints), order = at::empty({sizes.batch}, ints);
  const at::Tensor lengths = at::empty({sizes.batch}, ints);
  if (sizes.batch == 0) {
    cu_seqlens.zero_();
    count.zero_();
    indices.zero_();
    return {indices, cu_seqlens, count, query_only, order};
  }
  const Outputs out{indices.mutable_data_ptr<int64_t>(), cu_seqlens.mutable_data_ptr<int32_t>(),
                    count.mutable_data_ptr<int32_t>(),   query_only.mutable_data_ptr<int32_t>(),
                    order.mutable_data_ptr<int32_t>(),   lengths.mutable_data_ptr<int32_t>()};
  switch (mask.element_size()) {
    case 1: launch<uint8_t>(mask, sizes, out); break;
    case 2: launch<uint16_t>(mask, sizes, out); break;
    case 4: launch<uint32_t>(mask, sizes, out); break;
    default: launch<uint64_t>(mask, sizes, out);
  }
  // Without a capacity the host waits for the number of rows, and leaves what is behind them in the same memory.
  const at::Tensor exact = capacity.has_value() ? indices : indices.narrow(0, 0, count.item<int32_t>());
  return {exact, cu_seqlens, count, query_only, order};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(roberta_fast_cpp, m) {
  m.def("pack_indices_and_order(Tensor mask, int? capacity=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        torch::dispatch(c10::DispatchKey::CUDA, TORCH_FN(pack_indices)));
}

}  // namespace roberta_fast
