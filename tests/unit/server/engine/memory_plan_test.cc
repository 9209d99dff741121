// Spec: server/engine/memory_plan.h: Llama-3.1-8B on a card of 80 GB, as arithmetic.
// The device holds nothing; the model has the real one's shape, but two of its 32
// layers and a small vocabulary, which cost time to load and make no difference to
// prompts.
#include "server/engine/memory_plan.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <map>
#include <mutex>

#include "cuda/backend/cuda_backend.h"
#include "tests/support/tiny_model.h"

namespace pbs::server {
namespace {

constexpr int64_t kMegabyte = 1'000'000;
constexpr int64_t kProductWorkspace = int64_t{32} << 20;  // as cuBLASLt is given

// Device addresses that nobody may touch, and calls that do nothing.
class CountingDriver final : public cuda::Driver {
 public:
  explicit CountingDriver(int64_t memory_bytes)
      : info_{.name = "a card of 80 GB",
              .architecture = "sm_90",
              .memory_bytes = memory_bytes,
              .memory_bytes_free = memory_bytes,
              .traits = {}} {}

  const cuda::DeviceInfo& info() const override { return info_; }
  Status Health() override { return OkStatus(); }
  StatusOr<void*> Allocate(cuda::StreamId, int64_t bytes) override {
    void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) return ResourceExhausted("no addresses");
    const std::lock_guard lock(mutex_);
    sizes_[data] = bytes;
    return data;
  }
  void Free(void* data) override {
    const std::lock_guard lock(mutex_);
    munmap(data, static_cast<size_t>(sizes_.at(data)));
    sizes_.erase(data);
  }
  StatusOr<void*> AllocateHost(int64_t bytes) override {
    return ::operator new(static_cast<size_t>(bytes));
  }
  void FreeHost(void* data) override { ::operator delete(data); }
  Status Clear(cuda::StreamId, void*, int64_t) override { return OkStatus(); }
  Status CopyToDevice(cuda::StreamId, const void*, void*, int64_t) override {
    return OkStatus();
  }
  Status CopyToHost(cuda::StreamId, const void*, void*, int64_t) override {
    return OkStatus();
  }
  StatusOr<cuda::EventId> CreateEvent() override { return 0; }
  Status Record(cuda::EventId, cuda::StreamId) override { return OkStatus(); }
  Status WaitFor(cuda::EventId, cuda::StreamId) override { return OkStatus(); }
  Status Synchronize(cuda::EventId) override { return OkStatus(); }
  StatusOr<double> SecondsBetween(cuda::EventId, cuda::EventId) override { return 0; }
  Status Embed(const EmbedOp&) override { return OkStatus(); }
  Status Rotations(const RotationsOp&) override { return OkStatus(); }
  Status RmsNorm(const RmsNormOp&) override { return OkStatus(); }
  Status Qkv(const QkvOp&) override { return OkStatus(); }
  Status Logits(const LogitsOp&) override { return OkStatus(); }
  Status CopyRows(const CopyRowsOp&) override { return OkStatus(); }
  Status Gate(const cuda::GateRowsParams&, int64_t) override { return OkStatus(); }
  int64_t product_workspace_bytes() const override { return kProductWorkspace; }
  Status Multiply(const cuda::Product&) override { return OkStatus(); }
  Status OrderKeys(const cuda::CudaAttentionPlan&, const cuda::RunParams&) override {
    return OkStatus();
  }
  Status MakeLists(const cuda::CudaAttentionPlan&, const cuda::RunParams&) override {
    return OkStatus();
  }
  Status Attend(const cuda::CudaAttentionPlan&, const cuda::RunParams&) override {
    return OkStatus();
  }
  Status CorrectOutputs(const cuda::CudaAttentionPlan&,
                        const cuda::RunParams&) override {
    return OkStatus();
  }
  Status MeasureCoverage(const cuda::CudaAttentionPlan&,
                         const cuda::RunParams&) override {
    return OkStatus();
  }

 private:
  const cuda::DeviceInfo info_;
  std::mutex mutex_;
  std::map<void*, int64_t> sizes_;
};

constexpr int64_t kHidden = 4096, kInner = 14'336;
constexpr int64_t kVocabulary = 128'256, kSmallVocabulary = 2048;
constexpr int64_t kQueries = 32 * 128, kKeys = 8 * 128;
constexpr int32_t kLayers = 32;
constexpr int64_t kBytes = 2;  // of bf16
constexpr int64_t kWeightsOfALayer =
    kBytes * kHidden * (kQueries + 2 * kKeys + kQueries + 3 * kInner);
constexpr int64_t kWeights =
    kLayers * kWeightsOfALayer + 2 * kBytes * kVocabulary * kHidden;
// 90 % of what a driver leaves of 80 GB.
constexpr int64_t kCard = 79'000 * kMegabyte;
constexpr int64_t kBudget = kCard * 9 / 10 - kWeights;

class MemoryPlanSpec : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const testing_support::TinyModelFolder folder({.num_layers = 2,
                                                   .hidden_size = kHidden,
                                                   .num_heads = 32,
                                                   .num_kv_heads = 8,
                                                   .head_dim = 128,
                                                   .intermediate_size = kInner,
                                                   .vocab_size = kSmallVocabulary,
                                                   .positions_max = 1 << 20,
                                                   .dtype = DType::kBF16,
                                                   .zeros = true});
    backend_ = *cuda::CudaBackend::Create(std::make_unique<CountingDriver>(kCard));
    model_ = *Model::Load(folder.path(), {}, *backend_);
  }
  static void TearDownTestSuite() {
    model_.reset();
    backend_.reset();
  }
  static AttentionOptions Pbs() { return {}; }

  static inline std::unique_ptr<cuda::CudaBackend> backend_;
  static inline std::unique_ptr<Model> model_;
};

TEST_F(MemoryPlanSpec, WeightsAreThoseOfTheShape) {
  const int64_t two_layers =
      2 * kWeightsOfALayer + 2 * kBytes * kSmallVocabulary * kHidden;
  EXPECT_NEAR(static_cast<double>(model_->weight_bytes()),
              static_cast<double>(two_layers), kMegabyte);  // norms and biases
  EXPECT_EQ(kWeights / kMegabyte, 16'059);
}

TEST_F(MemoryPlanSpec, APromptOf128KRunsBesideItsCacheAndTheWeightsOn80GB) {
  constexpr int64_t kTokens = 131'072;
  const auto memory = PlanPromptMemory(*model_, kTokens, Pbs());
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->workspace.residual, kTokens * kHidden * 4);
  EXPECT_EQ(memory->workspace.queries, 2 * kTokens * kQueries * kBytes);
  EXPECT_EQ(memory->kv_window, 2 * 2 * kTokens * kKeys * kBytes);
  EXPECT_EQ(memory->kv / 2, 2 * kTokens * kKeys * kBytes) << "two of the layers";
  // What grows with the intermediate size is bounded by the row tile: gate and up, and
  // their product, of 8,192 rows.
  EXPECT_EQ(memory->workspace.tiles, 8192 * (kHidden + kInner) * kBytes);
  EXPECT_EQ(memory->workspace.linear, 8192 * 2 * kInner * kBytes + kProductWorkspace);
  // Permuted keys and values; order; lists of uint16 in the worst case.
  EXPECT_LE(memory->workspace.attention, 700 * kMegabyte);
  EXPECT_EQ(memory->device, memory->workspace.total() + memory->kv_window);
  EXPECT_LE(memory->device, 6'600 * kMegabyte);
  // All 32 layers could even stay on the device.
  EXPECT_LE(memory->device + 16 * memory->kv, kBudget);
}

TEST_F(MemoryPlanSpec, TheLongestPromptIsTheLongestThatFits) {
  const FreeMemory free = {int64_t{1} << 50, kBudget};
  const int32_t longest = LongestPrompt(*model_, Pbs(), 1 << 20, free);
  EXPECT_GE(longest, 512 * 1024);
  for (const int64_t bytes : {free.device / 10, free.device / 100}) {
    const FreeMemory less = {free.host, bytes};
    const int32_t tokens = LongestPrompt(*model_, Pbs(), 1 << 20, less);
    ASSERT_GT(tokens, 0);
    EXPECT_LE(PlanPromptMemory(*model_, tokens, Pbs())->device, bytes);
    EXPECT_GT(PlanPromptMemory(*model_, tokens + 1, Pbs())->device, bytes);
  }
  EXPECT_EQ(LongestPrompt(*model_, Pbs(), 4096, free), 4096);
  EXPECT_EQ(LongestPrompt(*model_, Pbs(), 1 << 20, {free.host, kMegabyte}), 0);
  EXPECT_LT(LongestPrompt(*model_, Pbs(), 1 << 20, {kMegabyte * 100, free.device}),
            12'500);
}

}  // namespace
}  // namespace pbs::server
