// The module roberta_fast._C: what the extension was built with, and the guard in front of its operators.
//
// It links no part of PyTorch. So it loads under any version, refuses a PyTorch that the operators were not built for with
// a reason, and loads them (roberta_fast._C_ops) under the one that they were.
#include <pybind11/pybind11.h>

#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators for CPU tensors (torch.ops.roberta_fast_cpp) and how they were built.";
  m.def("build_info", &build_info,
        "Compiler, C++ standard, flags, instruction sets chosen from at run time, torch version, CUDA version or None.");
  load_operators();
}
