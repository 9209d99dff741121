#include "emulator/async.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "emulator/block.h"
#include "emulator/synchronization.h"
#include "pbs/dtype.h"

namespace pbs::emulator {
namespace {

constexpr int kRows = 64;   // of a product
constexpr int kDepth = 16;  // of a product
constexpr int kSwizzleBytes = 1024;
constexpr int kBulkBytes = 16;

// The 128-byte swizzle: bits 4..6 of an address change by its bits 7..9.
uint32_t Swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

float ToFloat(uint16_t bits, bool is_bf16) {
  return is_bf16 ? pbs::ToFloat(bf16{bits}) : pbs::ToFloat(f16{bits});
}

// A shared-memory matrix as a warpgroup product's descriptor names it.
class Operand {
 public:
  Operand(uint64_t descriptor, bool mn_major, const Location& where)
      : start_(Field(descriptor, 0)),
        leading_(Field(descriptor, 16)),
        stride_(Field(descriptor, 32)),
        mn_major_(mn_major),
        where_(where) {
    if (descriptor >> 62 != 1) {
      Fail("the descriptor's layout is not the 128-byte swizzle", where);
    }
  }

  uint16_t At(int mn, int k) const {
    const uint32_t offset =
        mn_major_ ? mn / 64 * leading_ + k / 8 * stride_ + k % 8 * 128 + mn % 64 * 2
                  : mn / 8 * stride_ + mn % 8 * 128 + k * 2;
    const uint8_t* at = SharedBase() + Swizzled(start_ + offset);
    CheckReadable(at, 2, where_);
    CheckFenced(at, 2, where_);
    uint16_t value = 0;
    std::memcpy(&value, at, 2);
    return value;
  }

 private:
  static uint32_t Field(uint64_t descriptor, int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4;
  }

  uint32_t start_, leading_, stride_;
  bool mn_major_;
  const Location& where_;
};

// Row and column of register `index` of a thread's accumulator fragment.
struct Place {
  int row, column;
};
Place PlaceOf(int thread, int index) {
  const int lane = thread % kWarpThreads;
  return {thread / kWarpThreads * 16 + lane / 4 + index / 2 % 2 * 8,
          index / 4 * 8 + lane % 4 * 2 + index % 2};
}

using Tile = std::vector<float>;

Tile LoadA(const Product& product) {
  Tile a(static_cast<size_t>(kRows * kDepth));
  if (!product.a_in_registers) {
    const Operand operand(product.a_descriptor, /*mn_major=*/false, product.where);
    for (int row = 0; row < kRows; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        a[row * kDepth + k] = ToFloat(operand.At(row, k), product.bf16);
      }
    }
    return a;
  }
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    const int lane = thread % kWarpThreads;
    for (int i = 0; i < 8; ++i) {  // two halves of four registers
      const int row = thread / kWarpThreads * 16 + lane / 4 + i / 2 % 2 * 8;
      const int k = lane % 4 * 2 + i % 2 + i / 4 * 8;
      const uint32_t word = product.threads[thread].a[i / 2];
      a[row * kDepth + k] =
          ToFloat(static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16), product.bf16);
    }
  }
  return a;
}

Tile LoadB(const Product& product) {
  Tile b(static_cast<size_t>(kDepth * product.columns));
  const Operand operand(product.b_descriptor, product.b_transposed, product.where);
  for (int column = 0; column < product.columns; ++column) {
    for (int k = 0; k < kDepth; ++k) {
      b[k * product.columns + column] = ToFloat(operand.At(column, k), product.bf16);
    }
  }
  return b;
}

void Compute(const Product& product, Warpgroup& group) {
  const Tile a = LoadA(product);
  const Tile b = LoadB(product);
  Tile sums(static_cast<size_t>(kRows * product.columns));
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float x = a[row * kDepth + k];
      for (int column = 0; column < product.columns; ++column) {
        sums[row * product.columns + column] += x * b[k * product.columns + column];
      }
    }
  }
  for (int thread = 0; thread < kWarpgroupThreads; ++thread) {
    const Product::Thread& part = product.threads[thread];
    std::vector<float>& held = group.sums[thread].at(part.sums);
    for (int i = 0; i < product.columns / 2; ++i) {
      const auto [row, column] = PlaceOf(thread, i);
      const float sum = sums[row * product.columns + column];
      held[i] = part.accumulate ? held[i] + sum : sum;
    }
  }
}

Warpgroup& OwnWarpgroup(const Location& where) {
  Block& block = OwnBlock();
  const auto index = static_cast<size_t>(ThreadIndex() / kWarpgroupThreads);
  if ((static_cast<int>(index) + 1) * kWarpgroupThreads > block.all.expected) {
    Fail("this warpgroup has fewer than 128 threads", where);
  }
  return block.warpgroups[index];
}

// The thread's next product, new if it is the first to issue it.
Product& NextProduct(Warpgroup& group, int thread) {
  const int64_t number = group.issued[thread]++;
  const auto index = static_cast<size_t>(number - group.first_product);
  if (index == group.products.size()) group.products.emplace_back();
  return group.products[index];
}

// Computes the oldest products until `number` are done.
void ComputeUntil(Warpgroup& group, int64_t number) {
  while (group.computed < number) {
    Compute(group.products.front(), group);
    group.products.pop_front();
    ++group.first_product;
    ++group.computed;
  }
}

}  // namespace

void CopyBox(void* target, const TensorMap& map, uint64_t* barrier, int32_t column,
             int32_t row, int32_t head, int32_t batch, const Location& where) {
  auto* bytes = static_cast<uint8_t*>(target);
  if ((bytes - SharedBase()) % kSwizzleBytes != 0) {
    Fail("the target of a swizzled copy is not 1024-byte aligned", where);
  }
  const int64_t size = int64_t{map.box_rows} * kBoxColumns * 2;
  Poison(bytes, size, where);
  Later([=] {
    for (int32_t r = 0; r < map.box_rows; ++r) {
      for (int32_t c = 0; c < kBoxColumns; ++c) {
        uint16_t value = 0;
        if (map.Holds(column + c, row + r, head, batch)) {
          value = *map.At(column + c, row + r, head, batch);
        }
        const auto offset = static_cast<uint32_t>(r * 128 + c * 2);
        std::memcpy(bytes + Swizzled(offset), &value, 2);
      }
    }
    MarkCopied(bytes, size, where);
    MbarrierBytesCame(barrier, size, where);
  });
}

void CopyBytes(void* target, const void* source, int64_t bytes, uint64_t* barrier,
               const Location& where) {
  if (reinterpret_cast<uintptr_t>(target) % kBulkBytes != 0 ||
      reinterpret_cast<uintptr_t>(source) % kBulkBytes != 0 ||
      bytes % kBulkBytes != 0) {
    Fail("an address or a number of bytes is not a multiple of 16", where);
  }
  GlobalMemory::CheckRead(source, bytes, kBulkBytes, where);
  Poison(target, bytes, where);
  Later([=] {
    std::memcpy(target, source, static_cast<size_t>(bytes));
    MarkCopied(target, bytes, where);
    MbarrierBytesCame(barrier, bytes, where);
  });
}

void StoreBox(const TensorMap& map, const void* source, int32_t column, int32_t row,
              int32_t head, int32_t batch, const Location& where) {
  const auto* bytes = static_cast<const uint8_t*>(source);
  if ((bytes - SharedBase()) % kSwizzleBytes != 0) {
    Fail("the source of a swizzled store is not 1024-byte aligned", where);
  }
  int64_t* under_way =
      &OwnBlock().stores[static_cast<size_t>(ThreadIndex())].under_way.back();
  ++*under_way;
  Later([=] {
    const int64_t size = int64_t{map.box_rows} * kBoxColumns * 2;
    CheckReadable(bytes, size, where);
    CheckFenced(bytes, size, where);
    for (int32_t r = 0; r < map.box_rows; ++r) {
      for (int32_t c = 0; c < kBoxColumns; ++c) {
        if (!map.Holds(column + c, row + r, head, batch)) continue;
        auto* at = const_cast<uint16_t*>(map.At(column + c, row + r, head, batch));
        GlobalMemory::CheckWrite(at, 2, 2, where);
        std::memcpy(at, bytes + Swizzled(static_cast<uint32_t>(r * 128 + c * 2)), 2);
      }
    }
    --*under_way;
  });
}

void StoreCommit() {
  OwnBlock().stores[static_cast<size_t>(ThreadIndex())].Commit();
  Preempt();
}

void StoreWaitRead(const Location& where) {
  auto& under_way = OwnBlock().stores[static_cast<size_t>(ThreadIndex())].under_way;
  while (under_way.size() > 1) {  // the last is open
    while (under_way.front() != 0) {
      WaitWhileEqual(&under_way.front(), under_way.front(), "a wait for stores", where);
    }
    under_way.pop_front();
  }
  Preempt();
}

void IssueProduct(const ProductShape& shape, float* sums, bool accumulate,
                  uint64_t a_descriptor, const std::array<uint32_t, 4>* a_registers,
                  uint64_t b_descriptor, const Location& where) {
  Warpgroup& group = OwnWarpgroup(where);
  const int thread = ThreadIndex() % kWarpgroupThreads;
  if (!group.fenced[thread])
    Fail("a product without a fence since the last wait", where);
  Product& product = NextProduct(group, thread);
  const bool first = product.issued++ == 0;
  if (first) {
    product.a_descriptor = a_descriptor;
    product.b_descriptor = b_descriptor;
    product.columns = shape.columns;
    product.b_transposed = shape.b_transposed;
    product.bf16 = shape.bf16;
    product.a_in_registers = a_registers != nullptr;
    product.where = where;
  } else if (product.a_descriptor != a_descriptor ||
             product.b_descriptor != b_descriptor || product.columns != shape.columns) {
    Fail("the threads of a warpgroup issue different products", where);
  }
  product.threads[thread] = {sums, accumulate, {}};
  if (a_registers != nullptr) product.threads[thread].a = *a_registers;
  const auto count = static_cast<size_t>(shape.columns / 2);
  auto& held = group.sums[thread];
  if (!held.contains(sums)) held[sums].assign(sums, sums + count);
  std::fill_n(sums, count, std::numeric_limits<float>::quiet_NaN());
}

void WgmmaFence(const Location& where) {
  OwnWarpgroup(where).fenced[ThreadIndex() % kWarpgroupThreads] = true;
}

void WgmmaCommit(const Location& where) {
  Warpgroup& group = OwnWarpgroup(where);
  const int thread = ThreadIndex() % kWarpgroupThreads;
  const int64_t end = group.issued[thread];
  group.groups[thread].push_back(end);
  if (++group.commits[end] == kWarpgroupThreads) {
    group.commits.erase(end);
    group.committed.push_back(end);
    // Whichever happens first is the end of the group that was committed first.
    Later([&group] {
      ComputeUntil(group, group.committed.front());
      group.committed.pop_front();
    });
  }
  Preempt();
}

void WgmmaWait(int groups, const Location& where) {
  Warpgroup& group = OwnWarpgroup(where);
  const int thread = ThreadIndex() % kWarpgroupThreads;
  std::vector<int64_t>& committed = group.groups[thread];
  const auto kept = static_cast<size_t>(groups);
  if (committed.size() > kept) {
    // The thread waits for what the warpgroup multiplies, not for its other threads.
    const int64_t wanted = committed[committed.size() - kept - 1];
    while (group.computed < wanted) {
      WaitWhileEqual(&group.computed, group.computed, "a wait for products", where);
    }
    committed.erase(committed.begin(), committed.end() - static_cast<int64_t>(kept));
  }
  group.fenced[thread] = false;
  // Registers whose last product is done hold their sums again.
  auto& held = group.sums[thread];
  for (auto entry = held.begin(); entry != held.end();) {
    bool under_way = false;
    for (const Product& product : group.products) {
      under_way |= product.threads[thread].sums == entry->first;
    }
    if (under_way) {
      ++entry;
      continue;
    }
    std::copy(entry->second.begin(), entry->second.end(), entry->first);
    entry = held.erase(entry);
  }
  Preempt();
}

}  // namespace pbs::emulator
