// Projections in 8 bits and the attention over them, by tasks: some segments' rows are quantized once, then multiplied and
// attended to a panel of heads at a time. Query, key and value, three times as much as x, are never written to memory. The bits
// are those of the product and the attention one after the other.
#include <ATen/ops/empty.h>

#include "int8_linear.h"

#if ROBERTA_FAST_X86
namespace roberta_fast {
namespace {

constexpr int64_t GROUP =
    256;  // rows of short segments together, about: with 64 columns of each projection, for the second cache
constexpr int64_t LONGEST = 512;  // rows of the longest segment that is attended to so

// Neighbouring segments, whose rows are [begin, end); tasks and segments count from begin.
struct Group {
  int64_t begin, end;
  double work = 0.0;
  std::vector<Segment> segments{};
  std::vector<AttentionTask> tasks{};
};

// The rows in groups, those with the most work first.
std::vector<Group> make_groups(std::vector<Segment> segments, int64_t heads, int64_t width) {
  std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.index < b.index; });
  std::vector<Group> groups;
  for (const Segment& s : segments) {
    if (groups.empty() || s.query + s.queries - groups.back().begin > GROUP) groups.push_back({s.query, s.query});
    Group& group = groups.back();
    group.end = s.query + s.queries;
    group.work += static_cast<double>(s.queries) * (width + s.keys);
    group.segments.push_back({s.index, s.query - group.begin, s.queries, s.key - group.begin, s.keys, s.skipped});
  }
  for (Group& group : groups)
    for (const Segment& s : group.segments) add_tasks(s, heads, group.tasks);
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.work > b.work; });
  return groups;
}

}  // namespace

bool attends_by_tasks(int64_t heads, int64_t head_dim, const std::vector<Segment>& segments) {
  const bool fills = PANEL % head_dim == 0 || head_dim % PANEL == 0;
  const bool is_short = segments.empty() || segments.front().queries <= LONGEST;  // the first is the longest
  return head_dim % 16 == 0 && fills && heads * head_dim % PANEL == 0 && is_short;
}

at::Tensor int8_attention(const at::Tensor& x, const Int8Weight& projections, const std::vector<Segment>& segments, int64_t heads,
                          float scale) {
  const int64_t n = x.size(0), columns = projections.params.columns / 3, head_dim = columns / heads;
  const int64_t wide = std::max(head_dim, PANEL), units = columns / wide, of_unit = wide / head_dim;
  const std::vector<Group> groups = make_groups(segments, of_unit, x.size(1));
  int64_t most = 0, covered = 0;
  for (const Group& group : groups) most = std::max(most, group.end - group.begin), covered = std::max(covered, group.end);
  const at::Tensor out = at::empty({n, columns}, x.options());
  out.narrow(0, covered, n - covered).zero_();  // rows behind the last segment
  Int8Linear p = projections.params;
  p.x = x.const_data_ptr<float>(), p.of_x = {ROTATED, ROTATED, x.stride(0)};
  float* const to = out.mutable_data_ptr<float>();
  // Each share of a group's heads quantizes its rows again, so there are no more than keep the threads busy.
  const int64_t count = static_cast<int64_t>(groups.size()), wanted = 4 * at::get_num_threads();
  const int64_t shares = count ? std::min((wanted + count - 1) / count, units) : 0;
  const int64_t bytes = Int8Scratch::floats(p.groups, most), part = most * wide;
  for_each_task(count * shares, bytes + 3 * part + attention_scratch(head_dim), [&](int64_t task, float* memory) {
    const Group& group = groups[task / shares];
    const int64_t rows = group.end - group.begin, share = task % shares;
    const Int8Scratch scratch = Int8Scratch::in(memory, p.groups, most);
    float *const projected = memory + bytes, *const attending = projected + 3 * part;
    quantize_int8(p, group.begin, group.end, scratch);
    const auto heads_of = [&](int which) { return Packed<const float>{projected + which * part, head_dim, rows * head_dim}; };
    const int64_t last = units * (share + 1) / shares;
    for (int64_t unit = units * share / shares; unit < last; ++unit) {
      for (int which = 0; which < 3; ++which) {
        Int8Linear mine = p.part(which * columns + unit * wide, wide);
        const int64_t after = which < 2 ? (which + 1) * columns + unit * wide : std::min(unit + 1, units - 1) * wide;
        mine.y = projected + which * part, mine.of_y = {head_dim, rows * head_dim, head_dim};
        multiply_int8(mine, 0, rows, 0, mine.panels(), scratch, p.packed + after * p.groups);
      }
      const Packed<float> result{to + group.begin * columns + unit * wide, columns, head_dim};
      attend_blocks({.query = heads_of(0),
                     .key = heads_of(1),
                     .value = heads_of(2),
                     .out = result,
                     .lse = nullptr,
                     .rows = rows,
                     .shape = {of_unit, head_dim, scale, false, {}},
                     .tasks = group.tasks.data(),
                     .last_task = static_cast<int64_t>(group.tasks.size()) - 1,
                     .threads = 1,
                     .scratch = attending},
                    0, static_cast<int64_t>(group.tasks.size()));
    }
  });
  return out;
}

}  // namespace roberta_fast
#endif
