// The CPU backend as if its memory were a device's own: nobody may take its pointers
// for ordinary memory, and what is downloaded later arrives from another thread, late.
// For tests of what a server does around a device, under sanitizers too.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "pbs/cpu_backend.h"

namespace pbs::testing_support {

class DeviceBackend final : public Backend {
 public:
  // The so-many-th later download fails; 0: none does.
  explicit DeviceBackend(int fails_at = 0)
      : cpu_(*CreateCpuBackend({.num_threads = 1})),
        info_(cpu_->info()),
        fails_at_(fails_at),
        thread_([this] { Download(); }) {
    info_.host_memory = false;
    info_.device_bytes_free = int64_t{1} << 30;
  }
  ~DeviceBackend() override {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  const BackendInfo& info() const override { return info_; }
  DType ComputeDType(DType stored) const override { return cpu_->ComputeDType(stored); }
  StatusOr<Buffer> Allocate(int64_t bytes) override { return cpu_->Allocate(bytes); }
  StatusOr<Buffer> AllocateHost(int64_t bytes) override {
    return cpu_->AllocateHost(bytes);
  }
  Status Upload(const void* source, void* target, int64_t bytes) override {
    return cpu_->Upload(source, target, bytes);
  }
  Status Download(const void* source, void* target, int64_t bytes) override {
    return cpu_->Download(source, target, bytes);
  }
  void DownloadLater(const void* source, void* target, int64_t bytes,
                     std::function<void(const Status&)> done) override {
    {
      const std::lock_guard lock(mutex_);
      waiting_.push_back([this, source, target, bytes, done = std::move(done)] {
        const bool fails = ++downloads_ == fails_at_;
        done(fails ? Unavailable("a download failed, as it was told to")
                   : cpu_->Download(source, target, bytes));
      });
    }
    changed_.notify_all();
  }
  Status Synchronize() override { return cpu_->Synchronize(); }

  StatusOr<std::unique_ptr<PackedLinear>> PackLinear(
      const LinearSpec& spec, const RowReader& read,
      std::span<const float> bias) override {
    return cpu_->PackLinear(spec, read, bias);
  }
  int64_t LinearWorkspaceBytes(const PackedLinear& linear,
                               int64_t rows) const override {
    return cpu_->LinearWorkspaceBytes(linear, rows);
  }
  Status Linear(const PackedLinear& linear, const void* x, int64_t rows, void* y,
                Workspace workspace) override {
    return cpu_->Linear(linear, x, rows, y, workspace);
  }
  Status Embed(const EmbedOp& op) override { return cpu_->Embed(op); }
  Status Rotations(const RotationsOp& op) override { return cpu_->Rotations(op); }
  Status RmsNorm(const RmsNormOp& op) override { return cpu_->RmsNorm(op); }
  Status Qkv(const QkvOp& op) override { return cpu_->Qkv(op); }
  Status Logits(const LogitsOp& op) override { return cpu_->Logits(op); }
  Status CopyRows(const CopyRowsOp& op) override { return cpu_->CopyRows(op); }
  StatusOr<std::unique_ptr<AttentionPlan>> Plan(
      const AttentionProblem& problem) const override {
    return cpu_->Plan(problem);
  }
  Status Run(const AttentionPlan& plan, const AttentionTensors& tensors,
             Workspace workspace, const RunControl& control) override {
    return cpu_->Run(plan, tensors, workspace, control);
  }
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override {
    return cpu_->ReadReport(plan, workspace, request, report);
  }
  Status MarkTime(int mark) override { return cpu_->MarkTime(mark); }
  StatusOr<double> SecondsBetween(int from, int to) override {
    return cpu_->SecondsBetween(from, to);
  }

 private:
  void Download() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return ending_ || !waiting_.empty(); });
      if (waiting_.empty()) return;
      const std::function<void()> next = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      std::this_thread::yield();
      next();
      lock.lock();
    }
  }

  const std::unique_ptr<Backend> cpu_;
  BackendInfo info_;
  const int fails_at_;
  int downloads_ = 0;  // of the thread
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace pbs::testing_support
