// Fibers jump between stacks, which the C library's checks of jumps forbid.
#undef _FORTIFY_SOURCE
#include "emulator/machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>

#include "emulator/block.h"

namespace pbs::emulator {

namespace {

struct Stop {};  // thrown to leave a late operation after a fault

struct Fiber {
  ThreadState self;
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on: no system call, unlike swapcontext()
  bool started = false;
  std::unique_ptr<char[]> stack;
  bool done = false;
  // Waits while *counter == value, when counter is set.
  const int64_t* counter = nullptr;
  int64_t value = 0;
  const char* what = "";
  Location where;

  bool ready() const { return !done && (counter == nullptr || *counter != value); }
};

std::string Text(const Location& where) {
  std::string file = where.file_name();
  const size_t slash = file.find_last_of('/');
  if (slash != std::string::npos) file = file.substr(slash + 1);
  return file + ":" + std::to_string(where.line());
}

struct Region {
  const uint8_t* end;
  std::vector<bool> written;
};

std::map<const uint8_t*, Region>& Regions() {
  static auto& regions = *new std::map<const uint8_t*, Region>;
  return regions;
}

class Machine {
 public:
  Machine(const LaunchShape& shape, const std::function<void()>& body)
      : shape_(shape), body_(body), random_(shape.seed) {}

  Fault Run() {
    current_machine = this;
    for (int i = 0; i < std::min(shape_.resident_blocks, shape_.blocks); ++i) {
      StartBlock();
    }
    while (fault_.ok() && !fibers_.empty()) Round();
    current_machine = nullptr;
    return fault_;
  }

  static Machine& Current() {
    if (current_machine == nullptr) std::abort();  // a primitive outside a kernel
    return *current_machine;
  }

  Fiber& fiber() { return *current_; }
  const ThreadState& actor() const { return actor_; }
  const LaunchShape& shape() const { return shape_; }
  std::mt19937& random() { return random_; }
  void Later(std::function<void()> operation) {
    ++actor_.block->late_operations;
    pending_.push_back({actor_, std::move(operation)});
  }

  void Yield() {
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  // For good, if a thread runs.
  void LeaveThread() {
    if (current_ != nullptr) Yield();
  }

  void SetFault(const std::string& what, const Location& where) {
    if (!fault_.ok()) return;
    fault_ = {what, actor_.block->index, actor_.index, Text(where)};
  }

  // The body of a fiber.
  void Enter() {
    body_();
    current_->done = true;
    --current_->self.block->running;
    Yield();
  }

 private:
  void StartBlock() {
    auto block = std::make_unique<Block>();
    block->index = next_block_++;
    block->running = shape_.threads;
    block->shared_bytes = shape_.shared_bytes;
    block->storage.resize(static_cast<size_t>(shape_.shared_bytes) + 1024, 0xFF);
    const auto base = reinterpret_cast<uintptr_t>(block->storage.data());
    block->shared = reinterpret_cast<uint8_t*>((base + 1023) & ~uintptr_t{1023});
    block->written.assign(static_cast<size_t>(shape_.shared_bytes), false);
    block->unfenced.assign(static_cast<size_t>(shape_.shared_bytes), 0);
    block->all.expected = shape_.threads;
    const auto units = [&](int threads) {
      return static_cast<size_t>((shape_.threads + threads - 1) / threads);
    };
    block->warps.resize(units(kWarpThreads));
    for (Gathering& warp : block->warps) {
      warp.expected = std::min(kWarpThreads, shape_.threads);
    }
    block->warpgroups.resize(units(kWarpgroupThreads));
    block->warp_parts.resize(block->warps.size());
    block->copies.resize(static_cast<size_t>(shape_.threads));
    block->stores.resize(static_cast<size_t>(shape_.threads));
    block->spans.resize(static_cast<size_t>(shape_.threads));
    for (int i = 0; i < shape_.threads; ++i) StartThread({block.get(), i});
    blocks_.push_back(std::move(block));
  }

  void StartThread(const ThreadState& self) {
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.self = self;
    fiber.stack = std::make_unique<char[]>(static_cast<size_t>(shape_.stack_bytes));
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = static_cast<size_t>(shape_.stack_bytes);
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, EnterCurrent, 0);
  }
  static void EnterCurrent() { Current().Enter(); }

  struct LateOperation {
    ThreadState actor;
    std::function<void()> run;
  };

  // What is slow for a while: some warp, all threads a little, copies.
  struct Mood {
    const Block* block = nullptr;
    int warp = -1;
    uint32_t skip_one_in = 0;  // 0: none
    uint32_t copy_one_in = 1;
  };

  void ChangeMood() {
    constexpr uint32_t kSkips[] = {0, 2, 4};
    constexpr uint32_t kCopies[] = {1, 2, 64, 4096};
    mood_.block = blocks_[random_() % blocks_.size()].get();
    mood_.warp = static_cast<int>(random_() % (2 * mood_.block->warps.size()));
    mood_.skip_one_in = kSkips[random_() % 3];
    mood_.copy_one_in = kCopies[random_() % 4];
  }

  bool Skips(const Fiber& fiber) {
    const bool slow = fiber.self.block == mood_.block &&
                      fiber.self.index / kWarpThreads == mood_.warp;
    if (slow) return random_() % 16 != 0;
    return mood_.skip_one_in != 0 && random_() % mood_.skip_one_in == 0;
  }

  // Most threads that can go on do, in random order; late operations happen between.
  void Round() {
    constexpr int kMoodRounds = 24;
    if (++round_ % kMoodRounds == 1) ChangeMood();
    std::shuffle(fibers_.begin(), fibers_.end(), random_);
    bool can_go_on = false;
    for (size_t i = 0; i < fibers_.size() && fault_.ok(); ++i) {
      if (!fibers_[i]->ready()) continue;
      can_go_on = true;
      if (Skips(*fibers_[i])) continue;
      current_ = fibers_[i].get();
      current_->counter = nullptr;
      actor_ = current_->self;
      Resume(*current_);
      current_ = nullptr;
      if (random_() % 512 == 0) CompleteSome(/*waited_for=*/false);
    }
    if (!fault_.ok()) return;
    CompleteSome(/*waited_for=*/!can_go_on);
    std::erase_if(fibers_, [](const auto& fiber) { return fiber->done; });
    ReplaceFinishedBlocks();
    const bool stuck = !can_go_on && pending_.empty() &&
                       std::none_of(fibers_.begin(), fibers_.end(),
                                    [](const auto& fiber) { return fiber->ready(); });
    if (stuck && !fibers_.empty()) ReportDeadlock();
  }

  // In every second run copies end only when nothing else can happen.
  bool copies_are_lazy() const { return shape_.seed % 2 == 0; }

  // Until the fiber yields. Nothing here changes between the jumps.
  __attribute__((noinline)) void Resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  // waited_for: nothing else can happen. Then at least one ends, whichever.
  void CompleteSome(bool waited_for) {
    if (pending_.empty() || (copies_are_lazy() && !waited_for)) return;
    constexpr uint32_t kWaitedOneIn = 8;
    const uint32_t one_in = waited_for ? kWaitedOneIn : mood_.copy_one_in;
    const size_t chosen = waited_for ? random_() % pending_.size() : pending_.size();
    std::vector<LateOperation> due, kept;
    for (size_t i = 0; i < pending_.size(); ++i) {
      const bool now = i == chosen || random_() % one_in == 0;
      (now ? due : kept).push_back(std::move(pending_[i]));
    }
    pending_ = std::move(kept);
    for (LateOperation& operation : due) {
      actor_ = operation.actor;
      --actor_.block->late_operations;
      try {
        operation.run();
      } catch (const Stop&) {
        return;
      }
    }
  }

  void ReplaceFinishedBlocks() {
    for (const auto& block : blocks_) {
      if (block->running > 0 || block->late_operations == 0) continue;
      actor_ = {block.get(), 0};
      SetFault(std::to_string(block->late_operations) +
                   " copies were under way when the block ended",
               Location::current());
      return;
    }
    const auto finished =
        std::erase_if(blocks_, [](const auto& block) { return block->running == 0; });
    for (size_t i = 0; i < finished && next_block_ < shape_.blocks; ++i) StartBlock();
  }

  void ReportDeadlock() {
    std::map<std::string, int> waiting;
    for (const auto& fiber : fibers_) {
      ++waiting[std::string(fiber->what) + " at " + Text(fiber->where)];
    }
    std::string what = "deadlock:";
    for (const auto& [place, count] : waiting) {
      what += " " + std::to_string(count) + " threads in " + place + ";";
    }
    actor_ = fibers_.front()->self;
    SetFault(what, fibers_.front()->where);
  }

  static thread_local Machine* current_machine;

  const LaunchShape shape_;
  const std::function<void()>& body_;
  std::mt19937 random_;
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<LateOperation> pending_;
  int next_block_ = 0;
  int64_t round_ = 0;
  Mood mood_;
  Fiber* current_ = nullptr;
  ThreadState actor_;  // whose doing it is: the current thread, or who asked for it
  Fault fault_;
};

thread_local Machine* Machine::current_machine = nullptr;

}  // namespace

std::string Fault::ToString() const {
  if (ok()) return "no fault";
  return where + ": block " + std::to_string(block) + ", thread " +
         std::to_string(thread) + ": " + what;
}

Fault Launch(const LaunchShape& shape, const std::function<void()>& body) {
  return Machine(shape, body).Run();
}

const ThreadState& Self() { return Machine::Current().actor(); }
int ThreadIndex() { return Self().index; }
int BlockIndex() { return Self().block->index; }
int NumBlocks() { return Machine::Current().shape().blocks; }
int64_t GlobalTimer() {
  static std::atomic<int64_t> nanoseconds = 0;
  return ++nanoseconds;
}

void Fail(const std::string& what, const Location& where) {
  Machine& machine = Machine::Current();
  machine.SetFault(what, where);
  machine.LeaveThread();
  throw Stop{};
}

void WaitWhileEqual(const int64_t* counter, int64_t value, const char* what,
                    const Location& where) {
  Machine& machine = Machine::Current();
  while (*counter == value) {
    Fiber& fiber = machine.fiber();
    fiber.counter = counter;
    fiber.value = value;
    fiber.what = what;
    fiber.where = where;
    machine.Yield();
  }
}

void Preempt() {
  Machine& machine = Machine::Current();
  if (machine.random()() % 8 == 0) machine.Yield();
}

void Later(std::function<void()> operation) {
  Machine::Current().Later(std::move(operation));
}

uint8_t* SharedBase() { return Self().block->shared; }
int64_t SharedBytes() { return Self().block->shared_bytes; }

bool IsShared(const void* at) {
  const auto* byte = static_cast<const uint8_t*>(at);
  return byte >= SharedBase() && byte < SharedBase() + SharedBytes();
}

namespace {

std::string Span(const void* at, int64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "%lld bytes at %p", static_cast<long long>(bytes),
                at);
  return text;
}

// Offset into shared memory; faults when [at, at + bytes) leaves it.
int64_t SharedOffset(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = static_cast<const uint8_t*>(at) - SharedBase();
  if (offset < 0 || offset + bytes > SharedBytes()) {
    Fail(Span(at, bytes) + " leave the " + std::to_string(SharedBytes()) +
             " bytes of shared memory at offset " + std::to_string(offset),
         where);
  }
  return offset;
}

// The region that holds [at, at + bytes), or null.
Region* FindRegion(const void* at, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(at);
  auto& regions = Regions();
  auto next = regions.upper_bound(begin);
  if (next == regions.begin()) return nullptr;
  auto& [start, region] = *std::prev(next);
  return begin + bytes <= region.end ? &region : nullptr;
}

// Or a fault.
Region& RegionOf(const void* at, int64_t bytes, const Location& where) {
  Region* region = FindRegion(at, bytes);
  if (region == nullptr) Fail(Span(at, bytes) + " are in no global tensor", where);
  return *region;
}

void CheckAligned(const void* at, int64_t alignment, const Location& where) {
  if (reinterpret_cast<uintptr_t>(at) % static_cast<uintptr_t>(alignment) != 0) {
    Fail("an address is not a multiple of " + std::to_string(alignment), where);
  }
}

}  // namespace

void MarkWritten(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = SharedOffset(at, bytes, where);
  Block& block = OwnBlock();
  std::fill_n(block.written.begin() + offset, bytes, true);
  std::fill_n(block.unfenced.begin() + offset, bytes,
              static_cast<uint16_t>(1 + ThreadIndex()));
  WrittenSpan& span = block.spans[static_cast<size_t>(ThreadIndex())];
  span.begin = std::min(span.begin, offset);
  span.end = std::max(span.end, offset + bytes);
}

void MarkCopied(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = SharedOffset(at, bytes, where);
  std::fill_n(OwnBlock().written.begin() + offset, bytes, true);
  std::fill_n(OwnBlock().unfenced.begin() + offset, bytes, uint16_t{0});
}

void CheckFenced(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = SharedOffset(at, bytes, where);
  const auto begin = OwnBlock().unfenced.begin() + offset;
  const auto found =
      std::find_if(begin, begin + bytes, [](uint16_t thread) { return thread != 0; });
  if (found == begin + bytes) return;
  Fail("what thread " + std::to_string(*found - 1) +
           " wrote to shared memory is read by a copy or a product without a proxy "
           "fence between",
       where);
}

void ProxyFence() {
  Block& block = OwnBlock();
  WrittenSpan& span = block.spans[static_cast<size_t>(ThreadIndex())];
  const auto own = static_cast<uint16_t>(1 + ThreadIndex());
  for (int64_t i = span.begin; i < span.end; ++i) {
    auto& thread = block.unfenced[static_cast<size_t>(i)];
    if (thread == own) thread = 0;
  }
  span = {};
}

void Poison(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = SharedOffset(at, bytes, where);
  std::fill_n(OwnBlock().written.begin() + offset, bytes, false);
  std::fill_n(OwnBlock().unfenced.begin() + offset, bytes, uint16_t{0});
  std::memset(SharedBase() + offset, 0xFF, static_cast<size_t>(bytes));
}

void CheckReadable(const void* at, int64_t bytes, const Location& where) {
  const int64_t offset = SharedOffset(at, bytes, where);
  const auto begin = OwnBlock().written.begin() + offset;
  if (std::find(begin, begin + bytes, false) != begin + bytes) {
    Fail(Span(at, bytes) + " of shared memory (offset " + std::to_string(offset) +
             ") are read before they are written",
         where);
  }
}

void GlobalMemory::Allow(const void* at, int64_t bytes, bool written) {
  const auto* begin = static_cast<const uint8_t*>(at);
  Regions()[begin] = {begin + bytes,
                      std::vector<bool>(static_cast<size_t>(bytes), written)};
}

void GlobalMemory::Forbid(const void* at) {
  Regions().erase(static_cast<const uint8_t*>(at));
}

Fault GlobalMemory::MarkWritten(const void* at, int64_t bytes) {
  Region* region = FindRegion(at, bytes);
  if (region == nullptr) return {.what = Span(at, bytes) + " are in no global tensor"};
  const int64_t offset =
      static_cast<const uint8_t*>(at) - (region->end - region->written.size());
  std::fill_n(region->written.begin() + offset, bytes, true);
  return {};
}

Fault GlobalMemory::CheckAllowed(const void* at, int64_t bytes) {
  if (FindRegion(at, bytes) != nullptr) return {};
  return {.what = Span(at, bytes) + " are in no global tensor"};
}

void GlobalMemory::Clear() { Regions().clear(); }

void GlobalMemory::CheckRead(const void* at, int64_t bytes, int64_t alignment,
                             const Location& where) {
  CheckAligned(at, alignment, where);
  const Region& region = RegionOf(at, bytes, where);
  const int64_t offset =
      static_cast<const uint8_t*>(at) - (region.end - region.written.size());
  const auto begin = region.written.begin() + offset;
  if (std::find(begin, begin + bytes, false) != begin + bytes) {
    Fail(Span(at, bytes) + " of global memory are read before they are written", where);
  }
}

void GlobalMemory::CheckWrite(void* at, int64_t bytes, int64_t alignment,
                              const Location& where) {
  CheckAligned(at, alignment, where);
  Region& region = RegionOf(at, bytes, where);
  const int64_t offset =
      static_cast<uint8_t*>(at) - (region.end - region.written.size());
  std::fill_n(region.written.begin() + offset, bytes, true);
}

}  // namespace pbs::emulator
