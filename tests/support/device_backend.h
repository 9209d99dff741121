// The CPU backend with a device's behaviour: its memory counts as the device's own, and
// UploadLater() and DownloadLater() complete late, from another thread. Tests use it
// for the server's handling of devices, under sanitizers too.
#pragma once

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "pbs/cpu_backend.h"

namespace pbs::testing_support {

// Runs tasks in order on a thread of its own. A test can hold it.
class LateThread {
 public:
  LateThread() : thread_([this] { Run(); }) {}
  // Waits for all added tasks. Must not be held.
  ~LateThread() {
    Change([this] { ending_ = true; });
    thread_.join();
  }

  void Add(std::function<void()> what) {
    Change([&] { waiting_.push_back(std::move(what)); });
  }
  // Runs `more` more tasks, and then none until Release().
  void HoldAfter(int more) {
    Change([&] { left_ = more; });
  }
  void Release() {
    Change([this] { left_ = -1; });
  }

 private:
  template <class What>
  void Change(What&& what) {
    {
      const std::lock_guard lock(mutex_);
      what();
    }
    changed_.notify_all();
  }
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return waiting_.empty() ? ending_ : left_ != 0; });
      if (waiting_.empty()) return;
      if (left_ > 0) --left_;
      const std::function<void()> next = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      std::this_thread::yield();
      next();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  int left_ = -1;  // tasks to run until it is held; -1: it is not held
  bool ending_ = false;
  std::thread thread_;
};

// Faults and callbacks of a test. The thread that does the work calls the functions.
struct DevicePlan {
  int download_fails_at = 0;  // the number of the later download that fails; 0: none
  int upload_fails_at = 0;
  // The number of the started and finished report that fails; 0: none.
  int report_fails_at = 0;
  std::function<void()> on_allocate = {};  // called in Allocate()
  std::function<void()> on_run = {};
  // Called when an upload begins.
  std::function<void(const void* source)> on_upload = {};
  // Called after an upload's `done`.
  std::function<void()> on_uploaded = {};
};

class DeviceBackend final : public Backend {
 public:
  explicit DeviceBackend(DevicePlan plan = {})
      : cpu_(*CreateCpuBackend({.num_threads = 1})),
        info_(cpu_->info()),
        plan_(std::move(plan)) {
    info_.host_memory = false;
    info_.device_bytes_free = int64_t{1} << 30;
  }

  LateThread& uploads() { return uploads_; }

  const BackendInfo& info() const override { return info_; }
  DType ComputeDType(DType stored) const override { return cpu_->ComputeDType(stored); }
  StatusOr<Buffer> Allocate(int64_t bytes) override {
    if (plan_.on_allocate) plan_.on_allocate();
    return cpu_->Allocate(bytes);
  }
  StatusOr<Buffer> AllocateForUpload(int64_t bytes) override {
    PBS_ASSIGN_OR_RETURN(Buffer buffer, cpu_->Allocate(bytes));
    std::memset(buffer.data(), 0xFF, static_cast<size_t>(bytes));
    return buffer;
  }
  void UploadLater(const void* source, void* target, int64_t bytes,
                   std::function<void(const Status&)> done) override {
    uploads_.Add([this, source, target, bytes, done = std::move(done)] {
      if (plan_.on_upload) plan_.on_upload(source);
      if (++num_uploads_ == plan_.upload_fails_at) {
        done(Unavailable("an upload failed, as it was told to"));
      } else {
        done(bytes == 0 ? OkStatus() : cpu_->Upload(source, target, bytes));
      }
      if (plan_.on_uploaded) plan_.on_uploaded();
    });
  }
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
    downloads_.Add([this, source, target, bytes, done = std::move(done)] {
      const bool fails = ++num_downloads_ == plan_.download_fails_at;
      done(fails ? Unavailable("a download failed, as it was told to")
                 : cpu_->Download(source, target, bytes));
    });
  }

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
    if (plan_.on_run) plan_.on_run();
    return cpu_->Run(plan, tensors, workspace, control);
  }
  Status ReadReport(const AttentionPlan& plan, Workspace workspace,
                    const ReportRequest& request, AttentionReport* report) override {
    return cpu_->ReadReport(plan, workspace, request, report);
  }
  Status StartReport(const AttentionPlan& plan, Workspace workspace) override {
    return cpu_->StartReport(plan, workspace);
  }
  Status FinishReport(const AttentionPlan& plan, AttentionReport* report) override {
    PBS_RETURN_IF_ERROR(cpu_->FinishReport(plan, report));
    return ++num_reports_ == plan_.report_fails_at
               ? InvalidArgument("a report failed, as it was told to")
               : OkStatus();
  }
  Status MarkTime(int mark) override { return cpu_->MarkTime(mark); }
  StatusOr<double> SecondsBetween(int from, int to) override {
    return cpu_->SecondsBetween(from, to);
  }

 private:
  const std::unique_ptr<Backend> cpu_;
  BackendInfo info_;
  const DevicePlan plan_;
  int num_reports_ = 0;
  int num_downloads_ = 0;           // tasks of downloads_
  int num_uploads_ = 0;             // tasks of uploads_
  LateThread downloads_, uploads_;  // last: they end first
};

}  // namespace pbs::testing_support
