// Torch side of adamw_slices_, shared by the CPU and CUDA: what it checks, and which slices may lie among each other.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "head_update/head_update.h"
#include "hetero_noise/hetero_noise_op.h"

namespace pyml {

constexpr const char* kAdamOp = "adamw_slices_";

// The places of a tensor's elements, in bytes.
struct Place {
  uintptr_t begin, end;
  int64_t element;
  Elements e;  // joined dimensions, the smallest stride last: a run where it is 1
  Strided where;
  const char* name;
  size_t number;

  Place(const at::Tensor& t, const char* name, size_t number) : element(t.element_size()), name(name), number(number) {
    const Span span(t, number);
    begin = span.begin, end = span.end;
    Joined joined(t.sizes());
    joined.add(t, &where);
    joined.into(kAdamOp, e);
    for (int i = 1; i < e.dims; ++i)  // the smallest stride last, whatever the order of the dimensions
      for (int d = i; d > 0 && where.strides[d] > where.strides[d - 1]; --d) {
        std::swap(where.strides[d], where.strides[d - 1]);
        std::swap(e.sizes[d], e.sizes[d - 1]);
      }
  }

  bool in_runs() const { return e.dims > 0 && where.strides[e.dims - 1] == 1; }
  int64_t run() const { return (in_runs() ? e.sizes[e.dims - 1] : 1) * element; }

  // Where each run begins, in order.
  std::vector<uintptr_t> runs() const {
    std::vector<uintptr_t> found = {begin};
    for (int d = 0; d < e.dims - (in_runs() ? 1 : 0); ++d) {
      const std::vector<uintptr_t> before = found;
      found.clear();
      for (const uintptr_t at : before)
        for (int64_t i = 0; i < e.sizes[d]; ++i) found.push_back(at + uintptr_t(i * where.strides[d] * element));
    }
    std::sort(found.begin(), found.end());
    return found;
  }

  // Whether no byte belongs to both; `other` begins no earlier. Heads side by side in one matrix are told by their
  // pitch, others by going over their runs.
  bool beside(const Place& other) const {
    const int64_t pitch = where.strides[0] * element;
    const bool even = e.dims == 2 && other.e.dims == 2 && in_runs() && other.in_runs() && pitch > 0;
    if (even && other.where.strides[0] * other.element == pitch) {
      const int64_t apart = int64_t(other.begin - begin) % pitch;
      if (apart >= run() && apart + other.run() <= pitch) return true;
    }
    const std::vector<uintptr_t> mine = runs(), theirs = other.runs();
    for (size_t i = 0, j = 0; i < mine.size() && j < theirs.size();) {
      if (mine[i] + uintptr_t(run()) <= theirs[j])
        ++i;
      else if (theirs[j] + uintptr_t(other.run()) <= mine[i])
        ++j;
      else
        return false;
    }
    return true;
  }
};

// No element is written twice, and none that is read elsewhere: threads would meet there.
inline void check_places_apart(const std::vector<Place>& written, const std::vector<Place>& read) {
  std::vector<std::pair<Place, bool>> all;  // and whether it is written
  all.reserve(written.size() + read.size());
  for (const Place& p : written) all.emplace_back(p, true);
  for (const Place& p : read) all.emplace_back(p, false);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
  std::vector<const std::pair<Place, bool>*> open;  // those that reach beyond the current one's begin
  for (const auto& item : all) {
    const Place& p = item.first;
    open.erase(std::remove_if(open.begin(), open.end(), [&](const auto* o) { return o->first.end <= p.begin; }),
               open.end());
    for (const auto* o : open)
      PYML_CHECK((!o->second && !item.second) || o->first.beside(p), kAdamOp, p.name,
                 "slices whose elements are no others' too, since they are written to",
                 c10::str(o->first.name, "[", o->first.number, "] and ", p.name, "[", p.number, "]"));
    open.push_back(&item);
  }
}

// The lists of a call, checked, and the numbers of its step.
struct AdamArguments {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs;
  int64_t step;
  double lr;
  at::ArrayRef<double> betas;
  double eps, weight_decay;
  at::TensorList masters;
  const std::optional<at::Tensor>& key;
  Places ids;

  size_t count() const { return params.size(); }
  uint32_t id(size_t n) const { return uint32_t(ids ? (*ids)[n] : int64_t(n)); }
  at::Tensor master(size_t n) const { return masters.empty() ? at::Tensor() : masters[n]; }

  AdamStep numbers() const {
    const double b1 = betas[0], b2 = betas[1], n = double(step);
    return {1 - lr * weight_decay,      1 - b1, b2, 1 - b2, 1 / std::sqrt(1 - std::pow(b2, n)), eps,
            -lr / (1 - std::pow(b1, n))};
  }

  void check() const {
    const auto number = [](const char* name, double value) {
      PYML_CHECK(value >= 0 && std::isfinite(value), kAdamOp, name, "a finite number of at least 0", value);
    };
    PYML_CHECK(step >= 1 && step < (int64_t(1) << 32), kAdamOp, "step", "an integer in [1, 2^32)", step);
    number("lr", lr), number("eps", eps), number("weight_decay", weight_decay);
    PYML_CHECK(betas.size() == 2 && betas[0] >= 0 && betas[0] < 1 && betas[1] >= 0 && betas[1] < 1, kAdamOp, "betas",
               "two numbers in [0, 1)", betas);
    check_places(kAdamOp, "ids", ids, count(), int64_t(1) << 32);
    if (count() == 0) return;
    const at::Device device = params[0].device();
    if (key) {
      PYML_CHECK(masters.empty(), kAdamOp, "key", "none beside masters", "a tensor");
      NoiseArguments{kAdamOp, 0, *key, step}.check(device);
    }
    std::vector<Place> written, read;
    const auto list = [&](const char* name, at::TensorList tensors, std::vector<Place>& places) {
      PYML_CHECK(tensors.size() == count(), kAdamOp, name, c10::str(count(), " tensors"), tensors.size());
      for (size_t n = 0; n < count(); ++n) {
        check_float(kAdamOp, name, tensors[n], device);
        check_shape(kAdamOp, name, tensors[n], params[n].sizes());
        if (tensors[n].numel() > 0) places.emplace_back(tensors[n], name, n);
      }
    };
    list("params", params, written);
    list("grads", grads, read);
    list("exp_avgs", exp_avgs, written);
    list("exp_avg_sqs", exp_avg_sqs, written);
    if (!masters.empty()) list("masters", masters, written);
    check_places_apart(written, read);
  }
};

// Call: made of the arguments; add(n, param, grad, m, v, master) for each slice; run().
template <class Call>
void adamw_slices(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                  int64_t step, double lr, at::ArrayRef<double> betas, double eps, double weight_decay,
                  at::TensorList masters, const std::optional<at::Tensor>& key, Places ids) {
  const AdamArguments a{params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, eps, weight_decay, masters, key, ids};
  a.check();
  if (a.count() == 0) return;
  Call call(a);
  for (size_t n = 0; n < a.count(); ++n) call.add(n, params[n], grads[n], exp_avgs[n], exp_avg_sqs[n], a.master(n));
  call.run();
}

}  // namespace pyml
