#include "emulator/warp.h"

#include <cstring>
#include <deque>

#include "emulator/block.h"
#include "emulator/synchronization.h"
#include "pbs/dtype.h"

namespace pbs::emulator {
namespace {

constexpr int64_t kCopyBytes = 16;

AsyncCopies& OwnCopies() {
  return OwnBlock().copies[static_cast<size_t>(ThreadIndex())];
}

void CheckAligned(const void* at, const Location& where) {
  if (reinterpret_cast<uintptr_t>(at) % kCopyBytes != 0) {
    Fail("an address is not a multiple of 16", where);
  }
}

uint16_t Half(uint32_t word, int index) {
  return static_cast<uint16_t>(index == 0 ? word : word >> 16);
}

float Value(uint32_t word, int index, bool bf16) {
  const uint16_t bits = Half(word, index);
  return bf16 ? ToFloat(pbs::bf16{bits}) : ToFloat(f16{bits});
}

// A fault when rows of a matrix share banks. Part has `row` and `where`.
template <class Part>
void CheckBanks(const WarpParts& parts) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t taken = 0;  // pieces of a 128-byte line of banks
    for (int i = 0; i < 8; ++i) {
      const auto& owner = *static_cast<const Part*>(parts[matrix * 8 + i]);
      taken |= 1u << reinterpret_cast<uintptr_t>(owner.row) / 16 % 8;
    }
    if (taken != 0xFF) {
      Fail("rows of a matrix lie in the same banks",
           static_cast<const Part*>(parts[0])->where);
    }
  }
}

}  // namespace

void CopyAsync16(uint32_t offset, const void* source, bool inside,
                 const Location& where) {
  uint8_t* target = SharedBase() + offset;
  CheckAligned(target, where);
  if (inside) GlobalMemory::CheckRead(source, kCopyBytes, kCopyBytes, where);
  Poison(target, kCopyBytes, where);
  int64_t* under_way = &OwnCopies().under_way.back();
  ++*under_way;
  Later([=] {
    if (inside) {
      std::memcpy(target, source, kCopyBytes);
    } else {
      std::memset(target, 0, kCopyBytes);
    }
    MarkWritten(target, kCopyBytes, where);
    --*under_way;
  });
}

void CopyAsyncCommit() {
  OwnCopies().Commit();
  Preempt();
}

void CopyAsyncWait(int groups, const Location& where) {
  std::deque<int64_t>& under_way = OwnCopies().under_way;
  const auto kept = static_cast<size_t>(groups) + 1;  // and the open one
  while (under_way.size() > kept) {
    while (under_way.front() != 0) {
      WaitWhileEqual(&under_way.front(), under_way.front(), "a wait for copies", where);
    }
    under_way.pop_front();
  }
  Preempt();
}

uint32_t Ballot(bool vote, const Location& where) {
  struct Part {
    bool vote;
    uint32_t votes;
  } part{vote, 0};
  Together(
      &part,
      [](const WarpParts& parts) {
        uint32_t votes = 0;
        for (size_t lane = 0; lane < parts.size(); ++lane) {
          const auto* one = static_cast<const Part*>(parts[lane]);
          if (one != nullptr && one->vote) votes |= 1u << lane;
        }
        for (void* at : parts) {
          if (at != nullptr) static_cast<Part*>(at)->votes = votes;
        }
      },
      where);
  return part.votes;
}

std::array<uint32_t, 4> LoadMatrices(uint32_t offset, bool transposed,
                                     const Location& where) {
  const uint8_t* row = SharedBase() + offset;
  CheckAligned(row, where);
  CheckReadable(row, 16, where);
  struct Part {
    const uint16_t* row;
    bool transposed;
    std::array<uint32_t, 4> words;
    const Location& where;
  } part{reinterpret_cast<const uint16_t*>(row), transposed, {}, where};
  Together(
      &part,
      [](const WarpParts& parts) {
        CheckBanks<Part>(parts);
        const auto element = [&](int matrix, int row_index, int column) {
          const auto& owner = *static_cast<Part*>(parts[matrix * 8 + row_index]);
          return static_cast<uint32_t>(owner.row[column]);
        };
        for (int lane = 0; lane < kWarpThreads; ++lane) {
          auto& [unused, is_transposed, words, at] = *static_cast<Part*>(parts[lane]);
          const int one = lane / 4;
          const int two = lane % 4 * 2;
          for (int m = 0; m < 4; ++m) {
            words[m] = is_transposed
                           ? element(m, two, one) | element(m, two + 1, one) << 16
                           : element(m, one, two) | element(m, one, two + 1) << 16;
          }
        }
      },
      where);
  return part.words;
}

void StoreMatrices(uint32_t offset, const std::array<uint32_t, 4>& words,
                   const Location& where) {
  uint8_t* row = SharedBase() + offset;
  CheckAligned(row, where);
  struct Part {
    uint8_t* row;
    const std::array<uint32_t, 4>& words;
    const Location& where;
  } part{row, words, where};
  Together(
      &part,
      [](const WarpParts& parts) {
        CheckBanks<Part>(parts);
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int lane = 0; lane < kWarpThreads; ++lane) {
            const auto& from = *static_cast<const Part*>(parts[lane]);
            const auto& owner = *static_cast<const Part*>(parts[matrix * 8 + lane / 4]);
            std::memcpy(owner.row + lane % 4 * 4, &from.words[matrix], 4);
          }
        }
      },
      where);
  // Whole rows by the lanes that named them: who writes a byte makes the fence.
  MarkWritten(row, 16, where);
}

void MultiplyFragments(float* sums, const std::array<uint32_t, 4>& a,
                       const std::array<uint32_t, 2>& b, bool bf16,
                       const Location& where) {
  struct Part {
    float* sums;
    const std::array<uint32_t, 4>& a;
    const std::array<uint32_t, 2>& b;
    bool bf16;
  } part{sums, a, b, bf16};
  Together(
      &part,
      [](const WarpParts& parts) {
        float wide_a[16][16];
        float wide_b[16][8];
        for (int lane = 0; lane < kWarpThreads; ++lane) {
          const auto& from = *static_cast<const Part*>(parts[lane]);
          const int one = lane / 4;
          const int two = lane % 4 * 2;
          for (int i = 0; i < 2; ++i) {
            for (int word = 0; word < 4; ++word) {
              wide_a[one + word % 2 * 8][two + word / 2 * 8 + i] =
                  Value(from.a[word], i, from.bf16);
            }
            for (int word = 0; word < 2; ++word) {
              wide_b[two + word * 8 + i][one] = Value(from.b[word], i, from.bf16);
            }
          }
        }
        for (int lane = 0; lane < kWarpThreads; ++lane) {
          float* sums_of = static_cast<const Part*>(parts[lane])->sums;
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8;
            const int column = lane % 4 * 2 + i % 2;
            float sum = sums_of[i];
            for (int k = 0; k < 16; ++k) sum += wide_a[row][k] * wide_b[k][column];
            sums_of[i] = sum;
          }
        }
      },
      where);
}

}  // namespace pbs::emulator
