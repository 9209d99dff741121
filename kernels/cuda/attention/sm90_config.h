// Compile-time options and shared memory of Hopper's attention (attention_sm90.h).
#pragma once

#include "cuda/attention/attention_tile.h"
#include "cuda/primitives/primitives.h"

namespace pbs::cuda {

struct Sm90Options {
  int rows = kTileRows;  // query rows of a tile: 64 for each consumer warpgroup
  int stages = 2;        // stages of keys, and of values
  // 2: the next tile's queries are loaded while this tile is computed, and outputs are
  // stored through the queries' memory. 1: the kernel waits for queries and stores
  // outputs from registers.
  int query_buffers = 2;
  // The consumers issue their products in turn, so that the softmax of one overlaps the
  // products of another.
  bool takes_turns = true;
  // The next block's keys are requested before this block's values, which wait for the
  // slowest consumer's softmax.
  bool keys_first = true;
  // The second-level cache evicts queries first, keys and values last.
  bool cache_hints = false;
};

template <class ElementType, int kHeadDimension, Sm90Options kChosen>
struct Sm90Config {
  using Element = ElementType;
  static constexpr Sm90Options kOptions = kChosen;
  static constexpr int kHeadDim = kHeadDimension;  // 64 or 128
  static constexpr int kStages = kChosen.stages;
  static constexpr int kQueryBuffers = kChosen.query_buffers;
  static constexpr int kConsumers = kChosen.rows / 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kPanels = kHeadDim / 64;  // boxes of 64 columns
  // Bytes of a consumer's queries.
  static constexpr int kQueryBytes = 64 * kHeadDim * 2;
  // Bytes of a block of keys, or of values.
  static constexpr int kBlockBytes = kBlockKeys * kHeadDim * 2;
  // Registers of a thread. All warpgroups get the same share of 65,536 at launch; then
  // the consumers take some from the producer.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kChosen.rows == kTileRows || kChosen.rows == kWideTileRows);
  static_assert(kQueryBuffers == 1 || kQueryBuffers == 2);
};

// Slots for records of tiles. No barrier protects a record from being overwritten. The
// producer requests the queries of tile n when every consumer has begun tile n - 1.
// Then no thread reads the record of tile n - 2, whose slot the record of tile n + 1
// takes.
constexpr int kTileSlots = 3;

struct Sm90Operands {
  TensorMap q;  // box of 64 rows
  TensorMap k;  // box of 128 rows
  TensorMap v;
  TensorMap o;       // box of 64 rows
  int32_t q_packed;  // as RowStrides::packed
  int32_t kv_packed;
};

template <class Config>
struct alignas(1024) Sm90Shared {
  uint16_t q[Config::kQueryBuffers][Config::kConsumers][Config::kPanels][64 * 64];
  uint16_t k[Config::kStages][Config::kPanels][kBlockKeys * 64];
  uint16_t v[Config::kStages][Config::kPanels][kBlockKeys * 64];
  // Positions of a masked block's keys.
  alignas(16) Int2 positions[Config::kStages][kBlockKeys / 2];
  AttentionTile tile[kTileSlots];
  Mbarrier q_full[Config::kQueryBuffers][Config::kConsumers];
  Mbarrier q_empty[Config::kQueryBuffers][Config::kConsumers];
  Mbarrier k_full[Config::kStages], k_empty[Config::kStages];
  Mbarrier v_full[Config::kStages], v_empty[Config::kStages];
  Mbarrier tile_full[kTileSlots];
};

// A ring of kSlots: the index of the next slot, and the parity of its round.
template <int kSlots>
struct Ring {
  int slot = 0;
  int round = 0;

  PBS_DEVICE void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      round ^= 1;
    }
  }
};

}  // namespace pbs::cuda
