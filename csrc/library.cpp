// Every op of pyml, one schema a line: the table of contents. By convention (pyml/ops/_registry.py) <op>_bwd takes the
// gradient, the arguments of <op>_fwd and a mask of the gradients that are wanted; unwanted ones come back empty.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "common/cpu_isa.h"

// clang-format off
TORCH_LIBRARY(pyml, m) {
  // bspline: csrc/bspline, pyml/ops/bspline.py
  m.def("bspline_basis_fwd(Tensor x, Tensor grid, int order, int derivative, str extrapolation) -> Tensor");
  m.def("bspline_basis_bwd(Tensor grad, Tensor x, Tensor grid, int order, int derivative, str extrapolation, bool[] mask) -> Tensor");
  m.def("kan_linear_fwd(Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, int order, str base, str extrapolation) -> Tensor");
  m.def("kan_linear_bwd(Tensor grad, Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, int order, str base, str extrapolation, bool[] mask) -> (Tensor, Tensor, Tensor)");
  m.def("wkan_linear_fwd(Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, Tensor scaler, int order, str base, str extrapolation) -> Tensor");
  m.def("wkan_linear_bwd(Tensor grad, Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, Tensor scaler, int order, str base, str extrapolation, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("wkan_conv2d_fwd(Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, Tensor scaler, int[] kernel_size, int[] stride, int[] dilation, int order, str base, str extrapolation) -> Tensor");
  m.def("wkan_conv2d_bwd(Tensor grad, Tensor x, Tensor grid, Tensor coeff, Tensor? base_weight, Tensor scaler, int[] kernel_size, int[] stride, int[] dilation, int order, str base, str extrapolation, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)");

  // topk_attention: csrc/topk_attention, pyml/ops/topk_attention.py
  m.def("region_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor index, float? scale, Tensor? counts, Tensor? key_mask, Tensor? region_weight) -> (Tensor out, Tensor lse, Tensor exact, Tensor status)");
  m.def("region_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, float? scale, Tensor? counts, Tensor? key_mask, Tensor? region_weight, Tensor out, Tensor lse, Tensor exact, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("route_regions_fwd(Tensor q, Tensor k, int topk, float? scale, bool per_head, Tensor? query_mask, Tensor? key_mask) -> (Tensor index, Tensor logits)");
  m.def("topk_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask, int[1] topk, bool causal, float? scale, bool straight_through) -> (Tensor out, Tensor top, Tensor total, Tensor tau, Tensor cut, Tensor average)");
  m.def("topk_attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, int[1] topk, bool causal, float? scale, bool straight_through, Tensor out, Tensor top, Tensor total, Tensor tau, Tensor cut, Tensor average, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)");

  // batched_ot: csrc/batched_ot, pyml/ops/batched_ot.py
  m.def("sinkhorn_solve_fwd(Tensor cost, Tensor? a, Tensor? b, Tensor? init, float eps, int max_iter, float? tol, float? rho, bool implicit) -> (Tensor value, Tensor transport_cost, Tensor f, Tensor g, Tensor row_mass, Tensor n_iter, Tensor status)");
  m.def("sinkhorn_solve_bwd(Tensor grad_value, Tensor grad_transport, Tensor grad_f, Tensor grad_g, Tensor cost, Tensor? a, Tensor? b, Tensor? init, float eps, int max_iter, float? tol, float? rho, bool implicit, Tensor f, Tensor g, bool[] mask) -> (Tensor, Tensor, Tensor)");
  m.def("sinkhorn_plan_fwd(Tensor cost, Tensor? a, Tensor? b, Tensor f, Tensor g, float eps) -> Tensor");
  m.def("sinkhorn_plan_bwd(Tensor grad, Tensor cost, Tensor? a, Tensor? b, Tensor f, Tensor g, float eps, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pairwise_cost_fwd(Tensor x, Tensor y, str kind) -> Tensor");
  m.def("pairwise_cost_bwd(Tensor grad, Tensor x, Tensor y, str kind, bool[] mask) -> (Tensor, Tensor)");

  // hetero_noise: csrc/hetero_noise, pyml/ops/hetero_noise.py
  m.def("hetero_noise_fwd(Tensor x, Tensor scale, Tensor? columns, float std, Tensor key, SymInt step) -> Tensor");
  m.def("hetero_noise_bwd(Tensor grad, Tensor x, Tensor scale, Tensor? columns, float std, Tensor key, SymInt step, bool[] mask) -> (Tensor, Tensor, Tensor)");
  m.def("hetero_noise__fwd(Tensor(a!)[] tensors, Tensor[] scale, Tensor[] columns, float std, Tensor key, SymInt step, int[]? ids, int[]? offsets, float divide_by) -> ()");
  m.def("hetero_noise_sgd__fwd(Tensor(a!)[] params, Tensor[] grads, Tensor[] scale, Tensor[] columns, float std, Tensor key, SymInt step, float lr, int[]? ids, int[]? offsets, float divide_by) -> ()");
  m.def("clip_sum_fwd(Tensor[] per_sample_grads, float[] clip, Tensor[] scale, Tensor[] columns, int[]? groups, float? global_clip) -> (Tensor[] sums, Tensor norms, Tensor bad)");

  // head_update: csrc/head_update, pyml/ops/head_update.py
  m.def("adamw_slices__fwd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, SymInt step, float lr, float[] betas, float eps, float weight_decay, Tensor(d!)[] masters, Tensor? key, int[]? ids) -> ()");
  m.def("head_edit_fwd(Tensor x, int[] heads, Tensor? values, Tensor? matrix, float strength) -> Tensor");
  m.def("head_edit_bwd(Tensor grad, Tensor x, int[] heads, Tensor? values, Tensor? matrix, float strength, bool[] mask) -> (Tensor, Tensor, Tensor)");
  m.def("head_edit__fwd(Tensor(a!) x, int[] heads, Tensor? values, Tensor? matrix, float strength) -> ()");
}
// clang-format on

PYBIND11_MODULE(_C, m) {
  if (const char* isa = pyml::unknown_isa())
    throw pybind11::import_error("PYML_CPU_ISA: expected default, avx2 or avx512, got '" + std::string(isa) + "'");
  m.doc() = "Importing this module registers torch.ops.pyml; it holds no functions but the facts of its build.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["cplusplus"] = static_cast<long>(__cplusplus);
#ifdef PYML_WITH_CUDA
    info["cuda"] = true;
    info["cuda_arches"] = std::string(PYML_CUDA_ARCHES);
#else
    info["cuda"] = false;
    info["cuda_arches"] = std::string();
#endif
    info["isa"] = std::string(pyml::isa_name(pyml::cpu_isa()));
    return info;
  });
}
