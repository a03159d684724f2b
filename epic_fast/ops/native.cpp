// Planned calls and their autograd nodes, as native.py says.
//
// Nothing here knows CUDA's headers or libraries: memory comes from the allocator that PyTorch registered for the
// device, and the address of cuLaunchKernel from Python.  Whatever is out of the ordinary goes back to Python.

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr uintptr_t kMisaligned = 15;
constexpr int kInvalidContext = 201;
// Backward plans that a call keeps: their number is that of the layouts in which gradients arrive.
constexpr size_t kMostBackward = 8;

using LaunchKernel = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                             void**);

struct Memory {
  std::vector<int64_t> size, stride;
  at::ScalarType type;
};

struct Launch {
  uintptr_t function;
  unsigned programs, threads, shared;
  // Of each parameter: the place whose address it is, or -1 and its value.
  std::vector<int64_t> places;
  std::vector<uint64_t> values;
};

// As Python gives them.
using MemoryFields = std::tuple<std::vector<int64_t>, std::vector<int64_t>, at::ScalarType>;
using LaunchFields =
    std::tuple<uintptr_t, unsigned, unsigned, unsigned, std::vector<int64_t>, std::vector<uint64_t>>;

Tensor unpack(py::handle each) {
  return each.is_none() ? Tensor() : THPVariable_Unpack(each.ptr());
}

py::object pack(const Tensor& each) {
  return each.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(each)) : py::none();
}

py::list pack(const variable_list& tensors) {
  py::list found;
  for (const auto& each : tensors) found.append(pack(each));
  return found;
}

bool aligned(const variable_list& tensors) {
  uintptr_t all = 0;
  for (const auto& each : tensors) all |= reinterpret_cast<uintptr_t>(each.data_ptr());
  return (all & kMisaligned) == 0;
}

// No subclass, and no lazy sign or zero.
bool plain(const Tensor& each) {
  return !each.key_set().has(c10::DispatchKey::Python) && !each.is_neg() && !each._is_zerotensor();
}

// Everything about a tensor but its address.
void describe(const Tensor& each, std::vector<int64_t>& into) {
  into.push_back(static_cast<int64_t>(each.scalar_type()));
  into.push_back(each.get_device());
  into.push_back(each.dim());
  into.insert(into.end(), each.sizes().begin(), each.sizes().end());
  into.insert(into.end(), each.strides().begin(), each.strides().end());
}

// What Plan in kernels/common/plan.py does where all steps are plain launches; places are numbered as there.
class Plan {
 public:
  Plan(const std::string& device, int64_t given, const std::vector<MemoryFields>& made, int64_t scratch,
       std::vector<int64_t> offsets, const std::vector<LaunchFields>& launches, std::vector<int64_t> results,
       uintptr_t launch, py::function stream, py::function enter)
      : device_(device), given_(given), scratch_(scratch), offsets_(std::move(offsets)), results_(std::move(results)),
        launch_(reinterpret_cast<LaunchKernel>(launch)), stream_(std::move(stream)), enter_(std::move(enter)) {
    for (const auto& [size, stride, type] : made) made_.push_back({size, stride, type});
    for (const auto& [function, programs, threads, shared, places, values] : launches)
      launches_.push_back({function, programs, threads, shared, places, values});
    keys_ = c10::DispatchKeySet(device_.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU);
    try {
      allocator_ = c10::GetAllocator(device_.type());
    } catch (const c10::Error&) {
      allocator_ = nullptr;
    }
  }

  // Whether the tensors' card is the current one.
  bool here() const {
    return !device_.is_cuda() || c10::impl::VirtualGuardImpl(device_.type()).getDevice().index() == device_.index();
  }

  int64_t given() const { return given_; }

  // Results into found, and the driver's answer: 0, or why it refused a launch.  The GIL is held, but not while it
  // launches, so whoever calls must own this.
  int run(const variable_list& given, variable_list& found) const {
    variable_list made;
    made.reserve(made_.size());
    std::vector<uint64_t> places;
    places.reserve(1 + given.size() + made_.size() + offsets_.size());
    places.push_back(0);
    for (const auto& each : given) places.push_back(reinterpret_cast<uint64_t>(each.data_ptr()));
    for (const auto& each : made_) {
      made.push_back(empty(each.size, each.stride, each.type));
      places.push_back(reinterpret_cast<uint64_t>(made.back().data_ptr()));
    }
    Tensor scratch;
    if (!offsets_.empty()) {
      scratch = empty({scratch_}, {1}, at::kByte);
      const auto start = reinterpret_cast<uint64_t>(scratch.data_ptr());
      for (const auto each : offsets_) places.push_back(start + each);
    }
    auto* stream = reinterpret_cast<void*>(stream_(device_.index()).cast<uintptr_t>());
    int status = all(places, stream);
    if (status == kInvalidContext) {
      enter_(device_.index());
      status = all(places, stream);
    }
    if (status != 0) return status;
    found.reserve(results_.size());
    for (const auto place : results_) {
      if (place == 0) found.emplace_back();
      else if (place <= given_) found.push_back(given[place - 1]);
      else found.push_back(made[place - 1 - given_]);
    }
    return 0;
  }

 private:
  Tensor empty(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType type) const {
    if (allocator_ == nullptr) return at::empty_strided(size, stride, at::TensorOptions().dtype(type).device(device_));
    return at::detail::empty_strided_generic(size, stride, allocator_, keys_, type);
  }

  // The first launch that the driver refuses ends it: nothing has run then, or everything before it.
  int all(const std::vector<uint64_t>& places, void* stream) const {
    py::gil_scoped_release release;
    std::vector<void*> parameters;
    for (const auto& each : launches_) {
      parameters.clear();
      for (size_t index = 0; index < each.places.size(); ++index) {
        const void* at = each.places[index] < 0 ? static_cast<const void*>(&each.values[index])
                                                : static_cast<const void*>(&places[each.places[index]]);
        parameters.push_back(const_cast<void*>(at));
      }
      const int status = launch_(reinterpret_cast<void*>(each.function), each.programs, 1, 1, each.threads, 1, 1,
                                 each.shared, stream, parameters.data(), nullptr);
      if (status != 0) return status;
    }
    return 0;
  }

  c10::Device device_;
  int64_t given_;
  std::vector<Memory> made_;
  int64_t scratch_;
  std::vector<int64_t> offsets_;
  std::vector<Launch> launches_;
  std::vector<int64_t> results_;
  LaunchKernel launch_;
  py::function stream_, enter_;
  c10::DispatchKeySet keys_;
  c10::Allocator* allocator_;
};

// One kind of call of one autograd.Function: what is known of it stands in fields that Python fills in.
struct Call : torch::CustomClassHolder {
  Call(py::function forward, py::function backward, py::function quiet, std::vector<int64_t> gradients)
      : forward(std::move(forward)), backward(std::move(backward)), quiet(std::move(quiet)),
        gradients(std::move(gradients)) {}

  ~Call() override {
    // The last owner may be a node that a thread of PyTorch's own drops, or one that outlives Python.
    if (!Py_IsInitialized()) {
      forward.release(), backward.release(), quiet.release();
      new auto(std::move(forward_plan));
      new auto(std::move(backward_plans));
      return;
    }
    py::gil_scoped_acquire gil;
    forward = py::function(), backward = py::function(), quiet = py::function();
    forward_plan.reset();
    backward_plans.clear();
  }

  py::function forward, backward, quiet;
  // Of each given input the launcher's result that is its gradient, or -1.
  std::vector<int64_t> gradients;
  std::shared_ptr<Plan> forward_plan;
  // Which of its results are outputs, and what backward wants: input i as i, result j as -1 - j.
  std::vector<int64_t> outputs, saves;
  std::vector<int64_t> saved_like;
  std::vector<std::pair<std::vector<int64_t>, std::shared_ptr<Plan>>> backward_plans;
};

using CallRef = c10::intrusive_ptr<Call>;

struct Planned : torch::autograd::Function<Planned> {
  static variable_list forward(AutogradContext* ctx, const CallRef& call, at::TensorList given) {
    variable_list inputs(given.begin(), given.end()), outputs, saved, results;
    // Our own: another thread may put another in its place meanwhile.
    const auto plan = call->forward_plan;
    if (plan && plan->here() && aligned(inputs) && plan->run(inputs, results) == 0) {
      for (const auto each : call->outputs) outputs.push_back(results[each]);
      for (const auto each : call->saves) saved.push_back(each >= 0 ? inputs[each] : results[-1 - each]);
    } else {
      // A launch that was refused is tried again there, and refused in Python's own words.
      const auto found = call->forward(pack(inputs)).cast<py::tuple>();
      for (const auto each : found[0]) outputs.push_back(unpack(each));
      for (const auto each : found[1]) saved.push_back(unpack(each));
      if (!found[2].is_none()) {
        call->outputs = found[3].cast<std::vector<int64_t>>();
        call->saves = found[4].cast<std::vector<int64_t>>();
        call->forward_plan = found[2].cast<std::shared_ptr<Plan>>();
      }
    }
    if (call->saved_like.empty())
      for (const auto& each : saved) describe(each, call->saved_like);
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = at::IValue::make_capsule(call);
    ctx->save_for_backward(std::move(saved));
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    py::gil_scoped_acquire gil;
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const size_t count = call->gradients.size();
    variable_list found(1 + count), given;
    std::vector<int64_t> key;
    for (const auto& each : grads) {
      key.push_back(each.defined());
      if (!each.defined()) continue;
      describe(each, key);
      given.push_back(each);
    }
    if (given.empty()) return found;
    std::vector<bool> needs;
    for (size_t index = 0; index < count; ++index) {
      needs.push_back(call->gradients[index] >= 0 && ctx->needs_input_grad(index));
      key.push_back(needs.back());
    }
    const auto saved = ctx->get_saved_variables();
    std::vector<int64_t> like;
    bool ordinary = !at::GradMode::is_enabled();
    for (const auto& each : given) ordinary = ordinary && plain(each);
    for (const auto& each : saved) {
      // A hook on saved tensors may have made others of them, or none.
      ordinary = ordinary && each.defined() && plain(each);
      if (!ordinary) break;
      describe(each, like);
    }
    ordinary = ordinary && like == call->saved_like;
    if (ordinary) given.insert(given.end(), saved.begin(), saved.end());
    ordinary = ordinary && aligned(given) && call->quiet().cast<bool>();
    if (ordinary) {
      std::shared_ptr<Plan> plan;
      for (const auto& each : call->backward_plans)
        if (each.first == key) plan = each.second;
      variable_list results;
      if (plan && plan->here() && plan->run(given, results) == 0) {
        for (size_t index = 0; index < count; ++index)
          if (needs[index]) found[1 + index] = results[call->gradients[index]];
        return found;
      }
      ordinary = !plan;
    }
    py::list wanted;
    for (const auto each : needs) wanted.append(py::bool_(each));
    const auto slow = call->backward(pack(grads), pack(saved), wanted).cast<py::tuple>();
    const auto gradients = slow[0].cast<py::list>();
    for (size_t index = 0; index < count; ++index) found[1 + index] = unpack(gradients[index]);
    if (ordinary && !slow[1].is_none()) {
      auto plan = slow[1].cast<std::shared_ptr<Plan>>();
      if (plan->given() == static_cast<int64_t>(given.size())) {
        if (call->backward_plans.size() >= kMostBackward) call->backward_plans.erase(call->backward_plans.begin());
        call->backward_plans.emplace_back(std::move(key), std::move(plan));
      }
    }
    return found;
  }
};

py::tuple apply(const CallRef& call, const py::args& tensors) {
  variable_list inputs;
  inputs.reserve(tensors.size());
  for (const auto each : tensors)
    if (!each.is_none()) inputs.push_back(THPVariable_Unpack(each.ptr()));
  TORCH_CHECK(inputs.size() == call->gradients.size(), "a call of ", call->gradients.size(), " tensors got ",
              inputs.size());
  const auto outputs = Planned::apply(call, at::TensorList(inputs));
  py::tuple found(outputs.size());
  for (size_t index = 0; index < outputs.size(); ++index) found[index] = pack(outputs[index]);
  return found;
}

// The results; or why the driver refused, as a number.
py::object run(const std::shared_ptr<Plan>& plan, const py::list& tensors) {
  variable_list given, results;
  given.reserve(tensors.size());
  for (const auto each : tensors) given.push_back(THPVariable_Unpack(each.ptr()));
  const int status = plan->run(given, results);
  if (status != 0) return py::int_(status);
  py::tuple found(results.size());
  for (size_t index = 0; index < results.size(); ++index) found[index] = pack(results[index]);
  return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  py::class_<Plan, std::shared_ptr<Plan>>(module, "Plan")
      .def(py::init<const std::string&, int64_t, const std::vector<MemoryFields>&, int64_t, std::vector<int64_t>,
                    const std::vector<LaunchFields>&, std::vector<int64_t>, uintptr_t, py::function, py::function>())
      .def("run", torch::wrap_pybind_function(run));
  py::class_<Call, CallRef>(module, "Call")
      .def(py::init<py::function, py::function, py::function, std::vector<int64_t>>())
      .def("plans",
           [](const Call& call) { return std::make_pair(call.forward_plan != nullptr, call.backward_plans.size()); })
      .def("__call__", torch::wrap_pybind_function(apply));
}
