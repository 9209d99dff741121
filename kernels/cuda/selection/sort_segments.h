// Orders keys inside their segments by falling importance; of equal importance the
// lower position comes first.
#pragma once

#include "cuda/primitives/primitives.h"
#include "cuda/selection/sequences.h"

namespace pbs::cuda {

constexpr int kBytesPerSortedKey = 6;
// Above this number shared memory of a multiprocessor holds so few segments that each
// gets more threads.
constexpr int kFewSortedKeys = 2048;

// Number of sorted keys: `segment_size` and padding.
PBS_HOST_DEVICE constexpr int SortedKeys(int segment_size) {
  int keys = 1;
  while (keys < segment_size) keys *= 2;
  return keys;
}

// Grid [num_order_heads, total_segments]; dynamic shared memory of kBytesPerSortedKey
// for each of SortedKeys().
template <int kNumThreads>
struct SortSegments {
  static constexpr int kThreads = kNumThreads;

  PBS_DEVICE static void Run(const SelectionParams& params) {
    const GridPlace place = PlaceInGrid(params.total_segments);
    const int index = FindSequence<&SequenceRecord::segment_begin>(
        params.sequences, params.num_sequences, place.item);
    const SequenceRecord s = LoadGlobal(params.sequences + index);
    const int first = (place.item - s.segment_begin) * params.segment_size;
    // First slot of the segment, where a head has `blocks` blocks.
    const auto slots = [&](int blocks) {
      return (int64_t{place.head} * blocks + s.key_block_begin) * kBlockTokens + first;
    };
    const float* importance = params.importance + slots(params.total_key_blocks);
    int32_t* positions = params.positions + slots(params.copied_blocks);
    const int keys = SortedKeys(params.segment_size);
    const Shared shared(keys);
    for (int i = ThreadIndex(); i < keys; i += kThreads) {
      // The bits of non-negative floats are ordered like the floats. Their complements
      // sort in falling order, with padding last.
      uint32_t falling = 0xFFFFFFFFu;
      if (i < params.segment_size) {
        falling = ~FloatBits(LoadGlobal(importance + i));
      }
      StoreShared(shared.falling + i, falling);
      StoreShared(shared.index + i, static_cast<uint16_t>(i));
    }
    Sort(shared, keys);
    for (int i = ThreadIndex(); i < params.segment_size; i += kThreads) {
      StoreGlobal(positions + i, first + LoadShared(shared.index + i));
    }
  }

 private:
  struct Shared {
    PBS_DEVICE explicit Shared(int keys)
        : falling(reinterpret_cast<uint32_t*>(SharedMemory())),
          index(reinterpret_cast<uint16_t*>(falling + keys)) {}

    uint32_t* falling;
    uint16_t* index;
  };

  // A bitonic sort.
  PBS_DEVICE static void Sort(const Shared& shared, int keys) {
    for (int size = 2; size <= keys; size *= 2) {
      for (int stride = size / 2; stride > 0; stride /= 2) {
        SyncThreads();
        for (int pair = ThreadIndex(); pair < keys / 2; pair += kThreads) {
          const int low = 2 * pair - (pair & (stride - 1));
          Exchange(shared, low, low + stride, (low & size) == 0);
        }
      }
    }
    SyncThreads();
  }

  PBS_DEVICE static void Exchange(const Shared& shared, int low, int high,
                                  bool rising) {
    const uint32_t a = LoadShared(shared.falling + low);
    const uint32_t b = LoadShared(shared.falling + high);
    const uint16_t a_index = LoadShared(shared.index + low);
    const uint16_t b_index = LoadShared(shared.index + high);
    const bool greater = a > b || (a == b && a_index > b_index);
    if (greater != rising) return;
    StoreShared(shared.falling + low, b);
    StoreShared(shared.falling + high, a);
    StoreShared(shared.index + low, b_index);
    StoreShared(shared.index + high, a_index);
  }
};

}  // namespace pbs::cuda
