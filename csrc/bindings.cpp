// The module roberta_fast._C: what the extension was built with, the guard in front of its operators, and the data work of
// pretraining, whose arguments are numpy arrays.
//
// It links no part of PyTorch. So it loads under any version, refuses a PyTorch that the operators were not built for with
// a reason, and loads them (roberta_fast._C_ops) under the one that they were.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <utility>

#include "data/data.h"

namespace py = pybind11;

namespace {

constexpr const char* TORCH_VERSION_BUILT = ROBERTA_FAST_TORCH_VERSION;

#if defined(__clang__)
constexpr const char* COMPILER = "clang " __clang_version__;
#else
constexpr const char* COMPILER = "gcc " __VERSION__;
#endif

// A version without its local part: builds for CPU and CUDA of one release share the interfaces that are used here.
std::string release(const std::string& version) { return version.substr(0, version.find('+')); }

py::dict build_info() {
  py::dict info;
  info["compiler"] = COMPILER;
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["flags"] = ROBERTA_FAST_FLAGS;
#if defined(__x86_64__) && defined(__GNUC__)
  info["instruction_sets"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["instruction_sets"] = py::make_tuple("baseline");
#endif
  info["torch"] = TORCH_VERSION_BUILT;
  info["cuda"] = std::string(ROBERTA_FAST_CUDA_VERSION).empty() ? py::object(py::none()) : py::str(ROBERTA_FAST_CUDA_VERSION);
  return info;
}

void load_operators() {
  const auto torch = py::module_::import("torch");
  const std::string running = py::str(torch.attr("__version__"));
  if (release(running) != release(TORCH_VERSION_BUILT))
    throw py::import_error("it was built for torch " + std::string(TORCH_VERSION_BUILT) + " and this is torch " + running +
                           "; reinstall roberta_fast with `pip install --no-build-isolation --force-reinstall --no-deps`");
  const auto spec = py::module_::import("importlib.util").attr("find_spec")("roberta_fast._C_ops");
  if (spec.is_none()) throw py::import_error("its operators, roberta_fast._C_ops, are missing from the installation");
  try {
    torch.attr("ops").attr("load_library")(spec.attr("origin"));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_OSError)) throw;
    throw py::import_error(std::string("its operators do not load: ") + error.what());
  }
}

// A number that changes where the floats from address on do, but for a change of few of them: it reads 64 of count (FNV-1a).
uint64_t fingerprint(uintptr_t address, int64_t count) {
  const auto* bits = reinterpret_cast<const uint32_t*>(address);
  const int64_t step = std::max<int64_t>(1, count / 64);
  uint64_t hash = 0xCBF29CE484222325;
  for (int64_t i = 0; i < count; i += step) hash = (hash ^ bits[i]) * 0x100000001B3;
  return hash;
}

// Arrays are taken as they are or refused: a silent copy would cost more than the work.
template <class Element>
using Array = py::array_t<Element, py::array::c_style>;

template <class Element>
Array<Element> as_array(std::vector<Element>&& values) {
  auto* owned = new std::vector<Element>(std::move(values));
  const py::capsule owner(owned, [](void* vector) { delete static_cast<std::vector<Element>*>(vector); });
  return Array<Element>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple full_sentences(const Array<uint32_t>& sentence_lengths, const Array<uint32_t>& document_sentences, int64_t capacity,
                         int64_t per_block, int64_t per_piece) {
  if (per_block < 0 || per_piece < 0 || capacity <= per_block + per_piece)
    throw py::value_error("capacity " + std::to_string(capacity) + " leaves no room for a token");
  const uint32_t* documents = document_sentences.data();
  uint64_t sentences = 0;
  for (py::ssize_t i = 0; i < document_sentences.size(); ++i) sentences += documents[i];
  if (sentences != static_cast<uint64_t>(sentence_lengths.size()))
    throw py::value_error("document_sentences counts " + std::to_string(sentences) + " sentences, and sentence_lengths has " +
                          std::to_string(sentence_lengths.size()));
  roberta_fast::Packing packing;
  {
    const py::gil_scoped_release released;
    packing = roberta_fast::full_sentences(sentence_lengths.data(), documents, document_sentences.size(), capacity, per_block,
                                           per_piece);
  }
  return py::make_tuple(as_array(std::move(packing.piece_starts)), as_array(std::move(packing.block_starts)));
}

void mask_tokens(Array<int64_t> ids, Array<int64_t> labels, uint64_t seed, uint32_t epoch, uint64_t index,
                 std::tuple<uint64_t, uint64_t, uint64_t> below, int64_t mask_id, const Array<int64_t>& replacements,
                 const Array<uint8_t>& kinds, bool whole_words) {
  if (ids.size() != labels.size())
    throw py::value_error("labels must be as long as ids, " + std::to_string(ids.size()) + ", got " +
                          std::to_string(labels.size()));
  if (replacements.size() == 0) throw py::value_error("replacements must not be empty");
  const auto [select, mask, random] = below;
  const roberta_fast::MaskingRule rule{select,       mask,         random,     mask_id, replacements.data(), replacements.size(),
                                       kinds.data(), kinds.size(), whole_words};
  const int64_t wrong =
      roberta_fast::mask_tokens(ids.mutable_data(), labels.mutable_data(), ids.size(), rule, seed, epoch, index);
  if (wrong >= 0)
    throw py::value_error("id " + std::to_string(ids.at(wrong)) + " is outside of the vocabulary of " +
                          std::to_string(kinds.size()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators for CPU tensors (torch.ops.roberta_fast_cpp), how they were built, and the data work of pretraining.";
  m.def("build_info", &build_info,
        "Compiler, C++ standard, flags, instruction sets chosen from at run time, torch version, CUDA version or None.");
  m.def("fingerprint", &fingerprint, py::arg("address"), py::arg("count"), "prepacked.py: some of the floats at an address.");
  m.def("full_sentences", &full_sentences, py::arg("sentence_lengths").noconvert(), py::arg("document_sentences").noconvert(),
        py::arg("capacity"), py::arg("per_block"), py::arg("per_piece"), "blocks.full_sentences_ref.");
  m.def("mask_tokens", &mask_tokens, py::arg("ids").noconvert(), py::arg("labels").noconvert(), py::arg("seed"), py::arg("epoch"),
        py::arg("index"), py::arg("below"), py::arg("mask_id"), py::arg("replacements").noconvert(), py::arg("kinds").noconvert(),
        py::arg("whole_words"), "masking.mask_ref, in place.");
  load_operators();
}
