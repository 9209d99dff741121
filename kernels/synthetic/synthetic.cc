#include "kernels/synthetic/synthetic.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

#include "kernels/synthetic/normal.h"

namespace pbs {
namespace {

constexpr int32_t kRowBlock = 256;  // rows between two looks at `stop`

// Independent streams of one (seed, sequence). Values are part of the generator.
enum class Stream : uint64_t { kGroup = 1, kHead, kQueryRow, kKeyRow, kValueRow };

uint64_t KeyOf(uint64_t seed, int32_t sequence, Stream stream, int32_t head) {
  uint64_t key = MixKey(seed, static_cast<uint64_t>(sequence));
  key = MixKey(key, static_cast<uint64_t>(stream));
  return MixKey(key, static_cast<uint64_t>(head));
}

bool Stopped(const std::atomic<bool>* stop) {
  return stop != nullptr && stop->load(std::memory_order_relaxed);
}

// Row `row` of head `head` of a [heads, seq_len, head_dim] tensor.
void StoreRow(const SyntheticShape& shape, DType dtype, void* tensor, int32_t head,
              int32_t row, const float* values) {
  const int64_t element =
      (static_cast<int64_t>(head) * shape.seq_len + row) * shape.head_dim;
  ConvertElements(values, DType::kF32,
                  static_cast<char*>(tensor) + element * DTypeBytes(dtype), dtype,
                  shape.head_dim);
}

// The rotary embedding of one position at a time.
class Rotary {
 public:
  Rotary(const SyntheticShape& shape, double base) : half_(shape.head_dim / 2) {
    for (int32_t i = 0; i < half_; ++i) {
      frequency_.push_back(std::pow(base, -2.0 * i / shape.head_dim));
    }
    cos_.resize(frequency_.size());
    sin_.resize(frequency_.size());
  }

  const std::vector<double>& frequency() const { return frequency_; }

  void MoveTo(int32_t position) {
    for (int32_t i = 0; i < half_; ++i) {
      cos_[i] = static_cast<float>(std::cos(position * frequency_[i]));
      sin_[i] = static_cast<float>(std::sin(position * frequency_[i]));
    }
  }
  void Rotate(float* row) const {
    for (int32_t i = 0; i < half_; ++i) {
      const float a = row[i], b = row[i + half_];
      row[i] = a * cos_[i] - b * sin_[i];
      row[i + half_] = b * cos_[i] + a * sin_[i];
    }
  }

 private:
  const int32_t half_;
  std::vector<double> frequency_;
  std::vector<float> cos_, sin_;
};

// What the query heads of one KV head share.
struct Group {
  int32_t num_topics = 0;
  std::vector<std::vector<float>> directions;  // u, w_1 .. w_C, z: orthonormal
  std::vector<float> locality;                 // e, scaled
  std::vector<float> importance;               // [seq_len]
  std::vector<uint8_t> label;                  // [seq_len]

  const std::vector<float>& u() const { return directions.front(); }
  const std::vector<float>& w(int32_t topic) const { return directions[1 + topic]; }
  const std::vector<float>& z() const { return directions.back(); }
};

float Dot(const std::vector<float>& a, const float* b) {
  return std::inner_product(a.begin(), a.end(), b, 0.0f);
}

void AddScaled(float scale, const std::vector<float>& direction, float* row) {
  for (size_t i = 0; i < direction.size(); ++i) row[i] += scale * direction[i];
}

// Pairs that turn by less than 0.6 over the sequence, but enough for all directions.
std::vector<int32_t> SlowPairs(const Rotary& rotary, int32_t seq_len,
                               int32_t num_directions) {
  const auto half = static_cast<int32_t>(rotary.frequency().size());
  std::vector<int32_t> pairs;
  for (int32_t i = 0; i < half; ++i) {
    if (rotary.frequency()[i] * seq_len < 0.6) pairs.push_back(i);
  }
  const int32_t needed = num_directions / 2 + 1;
  if (static_cast<int32_t>(pairs.size()) < needed) {
    pairs.resize(static_cast<size_t>(needed));
    std::iota(pairs.begin(), pairs.end(), half - needed);
  }
  return pairs;
}

void MakeDirections(const SyntheticShape& shape, const Rotary& rotary,
                    NormalSource& random, Group& group) {
  const int32_t count = group.num_topics + 2;
  const std::vector<int32_t> pairs = SlowPairs(rotary, shape.seq_len, count);
  const int32_t half = shape.head_dim / 2;
  for (int32_t n = 0; n < count; ++n) {
    std::vector<float> direction(static_cast<size_t>(shape.head_dim), 0.0f);
    for (int32_t pair : pairs) {
      direction[pair] = static_cast<float>(random.Normal());
      direction[pair + half] = static_cast<float>(random.Normal());
    }
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough (Kahan)
      for (const auto& earlier : group.directions) {
        AddScaled(-Dot(earlier, direction.data()), earlier, direction.data());
      }
    }
    const float norm = std::sqrt(Dot(direction, direction.data()));
    for (float& value : direction) value /= norm;
    group.directions.push_back(std::move(direction));
  }
}

void MakeLocality(const SyntheticShape& shape, const SyntheticSetting& setting,
                  const Rotary& rotary, NormalSource& random, Group& group) {
  group.locality.assign(static_cast<size_t>(shape.head_dim), 0.0f);
  for (size_t i = 0; i < rotary.frequency().size(); ++i) {
    if (rotary.frequency()[i] > 2 * std::numbers::pi / 512) {
      group.locality[i] = static_cast<float>(random.Sign());
    }
  }
  const float norm = std::sqrt(Dot(group.locality, group.locality.data()));
  const auto scale =
      static_cast<float>(setting.local * std::pow(shape.head_dim, 0.25)) / norm;
  for (float& value : group.locality) value *= scale;
}

void MakeTokens(const SyntheticShape& shape, const SyntheticSetting& setting,
                NormalSource& random, Group& group) {
  const double decay = std::exp(-1.0 / setting.correlation_len);
  const double fresh = std::sqrt(1 - decay * decay);
  double slow = random.Normal();
  auto label = static_cast<uint8_t>(random.Bits() % group.num_topics);
  for (int32_t j = 0; j < shape.seq_len; ++j) {
    slow = decay * slow + fresh * random.Normal();
    double importance =
        setting.sigma_token * random.Normal() + setting.sigma_segment * slow;
    if (random.Uniform() < setting.p_heavy) importance += setting.heavy;
    if (j < setting.num_sinks) importance += setting.sink;
    if (random.Uniform() < 1 / setting.piece) {
      label = static_cast<uint8_t>(random.Bits() % group.num_topics);
    }
    group.importance.push_back(static_cast<float>(importance));
    group.label.push_back(label);
  }
}

Group MakeGroup(const SyntheticShape& shape, const SyntheticSetting& setting,
                const Rotary& rotary, uint64_t key) {
  NormalSource random(key);
  Group group;
  group.num_topics = std::clamp(setting.num_topics, 1, 6);
  MakeDirections(shape, rotary, random, group);
  MakeLocality(shape, setting, rotary, random, group);
  MakeTokens(shape, setting, random, group);
  return group;
}

// A normal row without its parts along the group's directions.
void FillBare(const Group& group, NormalSource& random, std::span<float> row) {
  random.Fill(row);
  for (const auto& direction : group.directions) {
    AddScaled(-Dot(direction, row.data()), direction, row.data());
  }
}

struct QueryHead {
  int32_t head = 0;
  double gain = 0;
  std::vector<float> sign;  // per topic
  uint64_t row_key = 0;
};

class StructuredGroup {
 public:
  StructuredGroup(const SyntheticShape& shape, const SyntheticSetting& setting,
                  uint64_t seed, int32_t sequence, int32_t kv_head)
      : shape_(shape),
        setting_(setting),
        kv_head_(kv_head),
        rotary_(shape, setting.rope_base),
        group_(MakeGroup(shape, setting, rotary_,
                         KeyOf(seed, sequence, Stream::kGroup, kv_head))),
        key_rows_(KeyOf(seed, sequence, Stream::kKeyRow, kv_head)),
        value_rows_(KeyOf(seed, sequence, Stream::kValueRow, kv_head)),
        row_(static_cast<size_t>(shape.head_dim)) {
    const int32_t group_size = shape.num_heads / shape.num_kv_heads;
    for (int32_t i = 0; i < group_size; ++i) {
      const int32_t head = kv_head * group_size + i;
      NormalSource random(KeyOf(seed, sequence, Stream::kHead, head));
      QueryHead query{head,
                      0.8 + 0.4 * random.Uniform(),
                      {},
                      KeyOf(seed, sequence, Stream::kQueryRow, head)};
      for (int32_t topic = 0; topic < group_.num_topics; ++topic) {
        query.sign.push_back(static_cast<float>(random.Sign()));
      }
      queries_.push_back(std::move(query));
    }
  }

  void WriteRow(int32_t row, const SyntheticTargets& targets) {
    rotary_.MoveTo(row);
    for (const QueryHead& query : queries_) {
      MakeQuery(query, row);
      StoreRow(shape_, targets.dtype, targets.q, query.head, row, row_.data());
    }
    MakeKey(row);
    StoreRow(shape_, targets.dtype, targets.k, kv_head_, row, row_.data());
    NormalSource random(MixKey(value_rows_, static_cast<uint64_t>(row)));
    random.Fill(row_);
    StoreRow(shape_, targets.dtype, targets.v, kv_head_, row, row_.data());
  }

 private:
  void MakeQuery(const QueryHead& query, int32_t row) {
    NormalSource random(MixKey(query.row_key, static_cast<uint64_t>(row)));
    FillBare(group_, random, row_);
    const double gain = query.gain * (1 + setting_.jitter * random.Normal());
    const uint8_t label = group_.label[row];
    AddScaled(static_cast<float>(gain), group_.u(), row_.data());
    AddScaled(query.sign[label], group_.z(), row_.data());
    AddScaled(static_cast<float>(setting_.topic), group_.w(label), row_.data());
    AddScaled(1.0f, group_.locality, row_.data());
    rotary_.Rotate(row_.data());
  }

  void MakeKey(int32_t row) {
    NormalSource random(MixKey(key_rows_, static_cast<uint64_t>(row)));
    FillBare(group_, random, row_);
    for (float& value : row_) value *= static_cast<float>(setting_.noise);
    const double root = std::sqrt(static_cast<double>(shape_.head_dim));
    const double missed = std::sqrt(std::max(0.0, 1 - setting_.rho * setting_.rho)) *
                          setting_.sigma_token * random.Normal();
    AddScaled(static_cast<float>(root * setting_.rho * group_.importance[row]),
              group_.u(), row_.data());
    AddScaled(static_cast<float>(root * missed), group_.z(), row_.data());
    if (setting_.topic > 0) {
      AddScaled(static_cast<float>(root), group_.w(group_.label[row]), row_.data());
    }
    AddScaled(1.0f, group_.locality, row_.data());
    rotary_.Rotate(row_.data());
  }

  const SyntheticShape shape_;
  const SyntheticSetting setting_;
  const int32_t kv_head_;
  Rotary rotary_;
  const Group group_;
  const uint64_t key_rows_, value_rows_;
  std::vector<QueryHead> queries_;
  std::vector<float> row_;
};

Status FillNoise(const SyntheticShape& shape, int32_t num_heads, uint64_t seed,
                 int32_t sequence, Stream stream, DType dtype, void* tensor,
                 const std::atomic<bool>* stop) {
  std::vector<float> values(static_cast<size_t>(shape.head_dim));
  for (int32_t head = 0; head < num_heads; ++head) {
    const uint64_t rows = KeyOf(seed, sequence, stream, head);
    for (int32_t row = 0; row < shape.seq_len; ++row) {
      if (row % kRowBlock == 0 && Stopped(stop)) {
        return Cancelled("generation of synthetic tensors was stopped");
      }
      NormalSource random(MixKey(rows, static_cast<uint64_t>(row)));
      random.Fill(values);
      StoreRow(shape, dtype, tensor, head, row, values.data());
    }
  }
  return OkStatus();
}

}  // namespace

Status GenerateStructured(const SyntheticShape& shape, const SyntheticSetting& setting,
                          uint64_t seed, int32_t sequence,
                          const SyntheticTargets& targets,
                          const std::atomic<bool>* stop) {
  for (int32_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    StructuredGroup group(shape, setting, seed, sequence, kv_head);
    for (int32_t row = 0; row < shape.seq_len; ++row) {
      if (row % kRowBlock == 0 && Stopped(stop)) {
        return Cancelled("generation of synthetic tensors was stopped");
      }
      group.WriteRow(row, targets);
    }
  }
  return OkStatus();
}

Status GenerateWhiteNoise(const SyntheticShape& shape, uint64_t seed, int32_t sequence,
                          const SyntheticTargets& targets,
                          const std::atomic<bool>* stop) {
  PBS_RETURN_IF_ERROR(FillNoise(shape, shape.num_heads, seed, sequence,
                                Stream::kQueryRow, targets.dtype, targets.q, stop));
  PBS_RETURN_IF_ERROR(FillNoise(shape, shape.num_kv_heads, seed, sequence,
                                Stream::kKeyRow, targets.dtype, targets.k, stop));
  return FillNoise(shape, shape.num_kv_heads, seed, sequence, Stream::kValueRow,
                   targets.dtype, targets.v, stop);
}

}  // namespace pbs
