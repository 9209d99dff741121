// A transformer in plain f64 loops, with which the model tests compare. It has dense
// attention and the default rotation, and runs the whole prompt. Its structure follows
// that of transformers.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "tests/support/model_folder.h"

namespace pbs::testing_support {

class ReferenceModel {
 public:
  using Rows = std::vector<std::vector<double>>;

  explicit ReferenceModel(const TinyModel& model) : model_(model) {}

  // Logits of every token of `tokens`.
  Rows Logits(const std::vector<int32_t>& tokens) {
    Rows stream;
    queries_.clear();
    for (int32_t token : tokens) {
      stream.push_back(Row(Weight("model.embed_tokens.weight"), token));
    }
    for (int32_t layer = 0; layer < Size("num_hidden_layers"); ++layer) {
      RunLayer("model.layers." + std::to_string(layer) + ".", stream);
    }
    const bool tied = model_.config.at("tie_word_embeddings");
    const std::string head = tied ? "model.embed_tokens" : "lm_head";
    Rows logits;
    for (const auto& x : stream) {
      logits.push_back(Linear(head, Norm("model.norm.weight", x)));
    }
    return logits;
  }

  // Rotated queries of the last Logits(): for each layer [tokens], each row with the
  // heads one after another.
  const std::vector<Rows>& queries() const { return queries_; }

 private:
  int32_t Size(const char* key) const { return model_.config.at(key); }
  const TestTensor& Weight(const std::string& name) const {
    return model_.tensors.at(name);
  }
  static std::vector<double> Row(const TestTensor& tensor, int64_t row) {
    const int64_t cols = tensor.shape.back();
    const auto begin = tensor.values.begin() + row * cols;
    return {begin, begin + cols};
  }

  std::vector<double> Norm(const std::string& name,
                           const std::vector<double>& x) const {
    double sum = 0;
    for (double value : x) sum += value * value;
    const double epsilon = model_.config.at("rms_norm_eps");
    const double factor = 1 / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
    std::vector<double> y = x;
    for (size_t i = 0; i < x.size(); ++i) y[i] *= factor * Weight(name).values[i];
    return y;
  }

  std::vector<double> Linear(const std::string& name,
                             const std::vector<double>& x) const {
    const TestTensor& weight = Weight(name + ".weight");
    const auto bias = model_.tensors.find(name + ".bias");
    std::vector<double> y;
    for (int64_t row = 0; row < weight.shape[0]; ++row) {
      double sum = bias == model_.tensors.end() ? 0.0 : bias->second.values[row];
      for (size_t i = 0; i < x.size(); ++i) {
        sum += x[i] * weight.values[row * static_cast<int64_t>(x.size()) + i];
      }
      y.push_back(sum);
    }
    return y;
  }

  // One head of a projection, rotated and, in models that do so, normalised.
  std::vector<double> Head(const std::vector<double>& all, int32_t head,
                           const std::string& norm, int32_t position) const {
    const int32_t dim = Size("head_dim");
    const auto begin = all.begin() + head * dim;
    std::vector<double> x(begin, begin + dim);
    if (model_.tensors.contains(norm)) x = Norm(norm, x);
    std::vector<double> y(x.size());
    const double theta = model_.config.at("rope_theta");
    for (int32_t i = 0; i < dim / 2; ++i) {
      const double angle = position * std::pow(theta, -2.0 * i / dim);
      y[i] = x[i] * std::cos(angle) - x[i + dim / 2] * std::sin(angle);
      y[i + dim / 2] = x[i + dim / 2] * std::cos(angle) + x[i] * std::sin(angle);
    }
    return y;
  }

  void RunLayer(const std::string& prefix, Rows& stream) {
    const int32_t heads = Size("num_attention_heads");
    const int32_t kv_heads = Size("num_key_value_heads");
    const int32_t dim = Size("head_dim");
    Rows queries, keys, values;
    for (const auto& x : stream) {
      const auto normed = Norm(prefix + "input_layernorm.weight", x);
      queries.push_back(Linear(prefix + "self_attn.q_proj", normed));
      keys.push_back(Linear(prefix + "self_attn.k_proj", normed));
      values.push_back(Linear(prefix + "self_attn.v_proj", normed));
    }
    const auto tokens = static_cast<int32_t>(stream.size());
    Rows& rotated = queries_.emplace_back(stream.size());
    for (int32_t t = 0; t < tokens; ++t) {
      std::vector<double> attended;
      for (int32_t head = 0; head < heads; ++head) {
        const int32_t kv_head = head / (heads / kv_heads);
        const auto q = Head(queries[t], head, prefix + "self_attn.q_norm.weight", t);
        rotated[t].insert(rotated[t].end(), q.begin(), q.end());
        std::vector<double> mass(static_cast<size_t>(t) + 1);
        double total = 0;
        for (int32_t s = 0; s <= t; ++s) {
          const auto k = Head(keys[s], kv_head, prefix + "self_attn.k_norm.weight", s);
          double dot = 0;
          for (int32_t d = 0; d < dim; ++d) dot += q[d] * k[d];
          mass[s] = std::exp(dot / std::sqrt(dim));
          total += mass[s];
        }
        for (int32_t d = 0; d < dim; ++d) {
          double sum = 0;
          for (int32_t s = 0; s <= t; ++s) {
            sum += mass[s] / total * values[s][kv_head * dim + d];
          }
          attended.push_back(sum);
        }
      }
      AddTo(stream[t], Linear(prefix + "self_attn.o_proj", attended));
    }
    for (auto& x : stream) {
      const auto normed = Norm(prefix + "post_attention_layernorm.weight", x);
      auto gate = Linear(prefix + "mlp.gate_proj", normed);
      const auto up = Linear(prefix + "mlp.up_proj", normed);
      for (size_t i = 0; i < gate.size(); ++i) {
        gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      }
      AddTo(x, Linear(prefix + "mlp.down_proj", gate));
    }
  }

  static void AddTo(std::vector<double>& x, const std::vector<double>& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  const TinyModel& model_;
  std::vector<Rows> queries_;
};

}  // namespace pbs::testing_support
