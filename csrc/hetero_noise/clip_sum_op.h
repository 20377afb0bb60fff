// Torch side of clip_sum, shared by the CPU and CUDA.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "hetero_noise/hetero_noise_arguments.h"

namespace pyml {

constexpr const char* kClipOp = "clip_sum";

struct ClipArguments {
  at::TensorList grads;
  at::ArrayRef<double> clip;
  ScaleLists scales;
  at::OptionalIntArrayRef groups;
  std::optional<double> global_clip;

  int64_t samples() const { return grads[0].size(0); }
  bool whitened() const { return !scales.scale.empty(); }
  int group(size_t n) const { return groups ? int((*groups)[n]) : 0; }

  void check() const {
    PYML_CHECK(!grads.empty(), kClipOp, "per_sample_grads", "at least one tensor", "none");
    PYML_CHECK(!clip.empty(), kClipOp, "clip", "at least one number", "none");
    for (const double c : clip)
      PYML_CHECK(c >= 0 && std::isfinite(c), kClipOp, "clip", "finite numbers of at least 0", c);
    if (global_clip)
      PYML_CHECK(*global_clip >= 0 && std::isfinite(*global_clip), kClipOp, "global_clip",
                 "None, or a finite number of at least 0", *global_clip);
    PYML_CHECK(!groups || groups->size() == grads.size(), kClipOp, "groups", c10::str(grads.size(), " integers"),
               groups->size());
    PYML_CHECK(groups || clip.size() == 1, kClipOp, "groups", c10::str("a list, for ", clip.size(), " clip norms"),
               "None");
    if (whitened()) scales.check();
    PYML_CHECK(whitened() || scales.columns.empty(), kClipOp, "columns", "none without a scale", scales.columns.size());
    for (size_t n = 0; n < grads.size(); ++n) {
      const at::Tensor& g = grads[n];
      check_float(kClipOp, "per_sample_grads", g, grads[0].device());
      PYML_CHECK(g.dim() > 0 && grads[0].dim() > 0 && g.size(0) == samples(), kClipOp, "per_sample_grads",
                 "shapes [B, ...] with one B", g.sizes());
      if (whitened()) check_factors(kClipOp, g.sizes().slice(1), scales.scale_of(n), scales.columns_of(n), g.device());
      PYML_CHECK(group(n) >= 0 && group(n) < int64_t(clip.size()), kClipOp, "groups",
                 c10::str("groups in [0, ", clip.size(), ")"), group(n));
    }
  }
};

// The op where a Call runs the kernels of a backend: made of the arguments; run(); then sums, norms and bad.
template <class Call>
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> clip_sum(at::TensorList grads, at::ArrayRef<double> clip,
                                                                     at::TensorList scale, at::TensorList columns,
                                                                     at::OptionalIntArrayRef groups,
                                                                     std::optional<double> global_clip) {
  const ClipArguments a{grads, clip, {kClipOp, scale, columns, grads.size()}, groups, global_clip};
  a.check();
  Call call(a);
  call.run();
  return {call.sums, call.norms, call.bad};
}

}  // namespace pyml
