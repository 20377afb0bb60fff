// The autograd formula of every op that pyml/ops/_registry.py registers: the forward saves what <op>_bwd takes, and the
// backward calls it. In C++ because the same in Python costs more than the kernels of a small layer. The backward of
// <op>_bwd itself, needed for second derivatives only, stays in Python. And the versions of what an op writes to.
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace pyml {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

enum class Kind { kTensor, kTensorList, kPlain };

struct Formula {
  c10::OperatorHandle forward, backward;
  std::vector<Kind> arguments;
  std::vector<int64_t> gradients;  // positions of the differentiable arguments
  size_t outputs;                  // how many outputs, the first ones, are differentiable
  std::vector<int64_t> kept;       // positions of the outputs that the backward takes
};

Kind kind_of(const c10::Argument& argument) {
  const auto type = argument.type()->cast<c10::OptionalType>();
  const auto& inner = type ? type->getElementType() : argument.type();
  if (inner->isSubtypeOf(*c10::TensorType::get())) return Kind::kTensor;
  return inner->isSubtypeOf(*c10::ListType::ofTensors()) ? Kind::kTensorList : Kind::kPlain;
}

// What the differentiable outputs look like, as plain numbers (compiled autograd takes no more): dtype, then sizes.
c10::impl::GenericList looks_of(const variable_list& outputs, size_t count) {
  c10::impl::GenericList found(c10::AnyType::get());
  for (size_t i = 0; i < count; ++i) {
    c10::impl::GenericList one(c10::AnyType::get());
    one.push_back(int64_t(outputs[i].scalar_type()));
    for (const c10::SymInt& size : outputs[i].sym_sizes()) one.push_back(size);
    found.push_back(std::move(one));
  }
  return found;
}

// Where an upstream gradient is absent, the backward takes one zero in this shape: whole tensors of zeros would be most
// of its memory.
at::Tensor absent(const c10::IValue& look, const at::TensorOptions& options) {
  const c10::List<c10::IValue> one = look.toList();
  c10::SymDimVector sizes;
  for (size_t i = 1; i < one.size(); ++i) sizes.push_back(one.get(i).toSymInt());
  return at::zeros({}, options.dtype(at::ScalarType(one.get(0).toInt()))).expand_symint(sizes);
}

// All tensors among the arguments, in order; absent ones are left out.
variable_list tensors_of(const Formula& formula, c10::ArrayRef<c10::IValue> arguments) {
  variable_list found;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (formula.arguments[i] == Kind::kTensor && arguments[i].isTensor()) found.push_back(arguments[i].toTensor());
    if (formula.arguments[i] == Kind::kTensorList && arguments[i].isTensorList())
      for (const at::Tensor& t : arguments[i].toTensorVector()) found.push_back(t);
  }
  return found;
}

struct Record : torch::autograd::Function<Record> {
  static variable_list forward(AutogradContext* ctx, at::TensorList tensors, const Formula* formula,
                               c10::ArrayRef<c10::IValue> arguments) {
    // What is no tensor is kept as it is, of a list of tensors only the length, of a tensor whether it was there.
    c10::impl::GenericList plain(c10::AnyType::get());
    plain.reserve(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
      const bool list = formula->arguments[i] == Kind::kTensorList && arguments[i].isTensorList();
      if (list)
        plain.push_back(int64_t(arguments[i].toTensorVector().size()));
      else
        plain.push_back(arguments[i].isTensor() ? c10::IValue(true) : arguments[i]);
    }
    Stack stack(arguments.begin(), arguments.end());
    {
      at::AutoDispatchBelowADInplaceOrView below;
      formula->forward.callBoxed(&stack);
    }
    variable_list outputs, saved(tensors.begin(), tensors.end());
    for (const c10::IValue& output : stack) outputs.push_back(output.toTensor());
    for (const int64_t i : formula->kept) saved.push_back(outputs[i]);
    ctx->saved_data["formula"] = int64_t(reinterpret_cast<intptr_t>(formula));
    ctx->saved_data["plain"] = std::move(plain);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    if (formula->outputs > 1) ctx->saved_data["looks"] = looks_of(outputs, formula->outputs);
    if (outputs.size() > formula->outputs)
      ctx->mark_non_differentiable({outputs.begin() + int64_t(formula->outputs), outputs.end()});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list upstream) {
    const auto& formula = *reinterpret_cast<const Formula*>(intptr_t(ctx->saved_data["formula"].toInt()));
    const variable_list saved = ctx->get_saved_variables();
    variable_list found(saved.size() - formula.kept.size() + 2);  // none for the two arguments that are no tensors
    upstream.resize(formula.outputs);
    if (std::none_of(upstream.begin(), upstream.end(), [](const auto& t) { return t.defined(); })) return found;
    Stack stack;
    stack.reserve(formula.outputs + formula.arguments.size() + formula.kept.size() + 1);
    for (size_t i = 0; i < formula.outputs; ++i) {
      if (!upstream[i].defined()) upstream[i] = absent(ctx->saved_data["looks"].toList().get(i), saved[0].options());
      stack.emplace_back(upstream[i]);
    }
    std::vector<size_t> place;  // of each argument among the tensors
    size_t next = 0;
    const c10::List<c10::IValue> plain = ctx->saved_data["plain"].toList();
    for (size_t i = 0; i < formula.arguments.size(); ++i) {
      const c10::IValue value = plain.get(i);
      place.push_back(next);
      if (value.isNone() || formula.arguments[i] == Kind::kPlain) {
        stack.push_back(value);
      } else if (formula.arguments[i] == Kind::kTensor) {
        stack.emplace_back(saved[next++]);
      } else {
        const int64_t size = value.toInt();
        stack.emplace_back(variable_list(saved.begin() + int64_t(next), saved.begin() + int64_t(next) + size));
        next += size_t(size);
      }
    }
    for (size_t i = 0; i < formula.kept.size(); ++i) stack.emplace_back(saved[next + i]);
    c10::List<bool> mask;
    for (const int64_t i : formula.gradients)
      mask.push_back(!plain.get(size_t(i)).isNone() && ctx->needs_input_grad(place[size_t(i)]));
    stack.emplace_back(mask);
    if (at::GradMode::is_enabled()) {  // somebody will differentiate the gradients
      formula.backward.callBoxed(&stack);
    } else {
      at::AutoDispatchBelowADInplaceOrView below;
      formula.backward.callBoxed(&stack);
    }
    for (size_t j = 0; j < formula.gradients.size(); ++j)
      if (mask.get(j)) found[place[size_t(formula.gradients[j])]] = stack[j].toTensor();
    return found;
  }
};

class Kernel final : public c10::OperatorKernel {
 public:
  explicit Kernel(Formula formula) : formula_(std::move(formula)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) const {
    const auto arguments = torch::jit::last(*stack, formula_.arguments.size());
    const variable_list tensors = tensors_of(formula_, arguments);
    for (const at::Tensor& t : tensors)  // a tangent that nobody carries on would count as zero
      TORCH_CHECK_NOT_IMPLEMENTED(
          !t.defined() || !t._fw_grad(0).defined(), op.schema().name(),
          ": forward-mode derivatives: expected reverse mode or backend='reference', got a dual");
    const bool needed = at::GradMode::is_enabled() &&
                        std::any_of(tensors.begin(), tensors.end(), [](const auto& t) { return t.requires_grad(); });
    if (!needed) {
      at::AutoDispatchBelowADInplaceOrView below;
      return op.callBoxed(stack);
    }
    variable_list outputs = Record::apply(at::TensorList(tensors), &formula_, arguments);
    torch::jit::drop(*stack, formula_.arguments.size());
    for (at::Tensor& output : outputs) stack->emplace_back(std::move(output));
  }

 private:
  const Formula formula_;
};

// Autograd sees a write only by the version of a tensor; without it, a stale value would enter a backward.
class Writes final : public c10::OperatorKernel {
 public:
  Writes(std::vector<int64_t> written, size_t arguments) : written_(std::move(written)), arguments_(arguments) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) const {
    std::vector<c10::IValue> values;
    for (const int64_t i : written_) values.push_back(torch::jit::peek(*stack, size_t(i), arguments_));
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    for (const c10::IValue& value : values)  // after the call: what an op refuses it has not written
      if (value.isTensor())
        wrote(value.toTensor());
      else if (value.isTensorList())
        for (const at::Tensor& t : value.toTensorVector()) wrote(t);
  }

 private:
  static void wrote(const at::Tensor& t) {
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
  }
  const std::vector<int64_t> written_;
  const size_t arguments_;
};

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

// Gives op `forward` its autograd formula: see Formula.
void register_autograd(const std::string& forward, const std::string& backward, at::IntArrayRef gradients,
                       int64_t outputs, at::IntArrayRef kept) {
  // Never freed: what a library registers goes when it goes.
  static auto* library =
      new torch::Library(torch::Library::IMPL, "pyml", c10::DispatchKey::Autograd, __FILE__, __LINE__);
  Formula formula{find(forward), find(backward), {}, gradients.vec(), size_t(outputs), kept.vec()};
  for (const auto& argument : formula.forward.schema().arguments()) formula.arguments.push_back(kind_of(argument));
  for (const int64_t i : gradients)
    TORCH_CHECK(formula.arguments.at(size_t(i)) == Kind::kTensor, forward, ": a gradient goes to a tensor only");
  library->impl(forward.c_str(),
                torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(std::move(formula))));
}

// Tells autograd of what op `name` writes: its arguments at these positions.
void register_writes(const std::string& name, at::IntArrayRef written) {
  static auto* library =
      new torch::Library(torch::Library::IMPL, "pyml", c10::DispatchKey::ADInplaceOrView, __FILE__, __LINE__);
  auto kernel = std::make_unique<Writes>(written.vec(), find(name).schema().arguments().size());
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(kernel)));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyml, m) {
  m.def("register_autograd(str forward, str backward, int[] gradients, int outputs, int[] kept) -> ()",
        &register_autograd);
  m.def("register_writes(str name, int[] written) -> ()", &register_writes);
}

}  // namespace pyml
