// Torch side of adamw_slices_, shared by the CPU and CUDA: what it checks, and which slices may lie among each other.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/random_host.h"
#include "common/strided_host.h"
#include "head_update/head_update.h"

namespace pyml {

constexpr const char* kAdamOp = "adamw_slices_";

// The places of a tensor's elements, in bytes.
struct Place {
  uintptr_t begin, end;
  int64_t element;
  Elements e;  // joined dimensions, the smallest stride last: a run where it is 1
  Strided where;

  Place(const at::Tensor& t, const Span& span) : begin(span.begin), end(span.end), element(t.element_size()) {
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

// A tensor of a list: the bytes from its first element to behind its last one.
struct Listed : Span {
  const at::Tensor& t;
  const char* name;
  bool written;
  std::optional<Place> place;  // made where another tensor begins before this one ends

  Listed(const at::Tensor& t, const char* name, size_t number, bool written)
      : Span(t, number), t(t), name(name), written(written) {}
  const Place& at() {
    if (!place) place.emplace(t, *this);
    return *place;
  }
};

// No element is written twice, and none that is read elsewhere: threads would meet there.
inline void check_places_apart(std::vector<Listed>& all) {
  std::vector<Listed*> order;
  order.reserve(all.size());
  for (Listed& item : all) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const Listed* a, const Listed* b) { return a->begin < b->begin; });
  std::vector<Listed*> open;  // those that reach beyond the current one's begin
  for (Listed* item : order) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Listed* o) { return o->end <= item->begin; }),
               open.end());
    for (Listed* o : open)
      PYML_CHECK((!o->written && !item->written) || o->at().beside(item->at()), kAdamOp, item->name,
                 "slices whose elements are no others' too, since they are written to",
                 c10::str(o->name, "[", o->tensor, "] and ", item->name, "[", item->tensor, "]"));
    open.push_back(item);
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

  // Slices of one id would be rounded by the same words.
  void check_ids() const {
    if (!ids) return;
    std::vector<int64_t> known;
    for (size_t n = 0; n < count(); ++n)
      if (params[n].numel() > 0) known.push_back((*ids)[n]);
    std::sort(known.begin(), known.end());
    const auto twice = std::adjacent_find(known.begin(), known.end());
    PYML_CHECK(twice == known.end(), kAdamOp, "ids", "numbers that differ, or slices would get the same noise", *twice);
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
    const auto as_many = [&](const char* name, at::TensorList tensors) {
      PYML_CHECK(tensors.size() == count(), kAdamOp, name, c10::str(count(), " tensors"), tensors.size());
    };
    as_many("grads", grads), as_many("exp_avgs", exp_avgs), as_many("exp_avg_sqs", exp_avg_sqs);
    if (!masters.empty()) as_many("masters", masters);
    if (count() == 0) return;
    const at::Device device = params[0].device();
    if (key) {
      PYML_CHECK(masters.empty(), kAdamOp, "key", "none beside masters", "a tensor");
      check_key(kAdamOp, *key, step, device);
    }
    std::vector<Listed> all;
    all.reserve(count() * (masters.empty() ? 4 : 5));
    std::vector<const void*> empty;  // that are written to
    const auto list = [&](const char* name, at::TensorList tensors, bool written) {
      for (size_t n = 0; n < tensors.size(); ++n) {
        const at::Tensor& t = tensors[n];
        check_float(kAdamOp, name, t, device);
        check_shape(kAdamOp, name, t, params[n].sizes());
        if (written) check_written(kAdamOp, name, t);
        if (t.numel() > 0)
          all.emplace_back(t, name, n, written);
        else if (written)
          empty.push_back(t.unsafeGetTensorImpl());
      }
    };
    list("params", params, true);
    list("grads", grads, false);
    list("exp_avgs", exp_avgs, true);
    list("exp_avg_sqs", exp_avg_sqs, true);
    list("masters", masters, true);
    check_places_apart(all);
    std::sort(empty.begin(), empty.end());
    PYML_CHECK(std::adjacent_find(empty.begin(), empty.end()) == empty.end(), kAdamOp, "params",
               "tensors that differ, since they are written to", "one of them twice");
    check_ids();
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
