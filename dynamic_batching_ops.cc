// Licensed under the Apache License, Version 2.0; see LICENSE.

// Dynamic batching: many steps of a session each ask for a computation on one
// element, one step computes them together.
//
// The life of a request:
//
//  1. DynamicBatcherCompute, run by a caller, makes a `Request` of its inputs
//     (each with leading dimension 1) and returns; the request waits in
//     `Batcher::waiting_` and no thread waits with it.
//  2. DynamicBatcherGetInputs, run by whoever computes, makes a `Taker`, which
//     waits in `Batcher::takers_` likewise.
//  3. As soon as a taker and enough requests wait (see `Batcher::IsReady`; the
//     `AlarmClock` watches the timeout), these leave the queues together as a
//     `Batch`, and a `Computation` in `Batcher::running_` remembers its
//     requests. The inputs are concatenated and handed to the taker with the
//     computation's id. Another taker may get the next batch meanwhile.
//  4. DynamicBatcherSetOutputs brings the outputs under that id: each request
//     gets its row. DynamicBatcherFail brings an error in their place.
//
// Closing the batcher or cancelling a waiter's step may interfere at any point.
// Everything about who waits changes under `Batcher::mu_`, and whoever sets
// `Waiter::claimed` there is the only one to end that wait, after releasing the
// lock: tensors are copied and `done` is called with no lock held.
//
// A waiter's `done` holds a reference to its batcher, and so does its
// cancellation callback; the alarm clock holds a weak one. So the batcher lives
// while anybody waits in it, and no longer than its session's resources.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "tensorflow/core/framework/cancellation.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_handle.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/framework/tensor.h"
#include "tensorflow/core/framework/tensor_shape.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/intrusive_ptr.h"
#include "tensorflow/core/platform/refcount.h"
#include "tensorflow/core/platform/thread_annotations.h"
#include "tensorflow/core/platform/threadpool.h"

namespace tensorflow {
namespace dynamic_batching {
namespace {

using Clock = std::chrono::steady_clock;
using shape_inference::InferenceContext;
using shape_inference::ShapeHandle;

// From this size on a row of the outputs is handed out as an alias of the whole
// tensor instead of a copy. An alias takes 0.05 us, a copy of 1 KiB 0.1 us, of
// 64 KiB 2 us and of 1 MiB 300 us (measured), but a copy lets go of the whole
// tensor, which a caller may otherwise keep alive for long.
constexpr int64_t kMinAliasedBytes = 64 << 10;

// Keeps `arrival + timeout` within the clock's range.
constexpr int64_t kMaxTimeoutMs = int64_t{1} << 40;

// The "owner" of a computation for which DynamicBatcherFail isn't used.
constexpr int64_t kNoOwner = -1;

absl::Status ClosedError() {
  return absl::CancelledError("The batcher is closed.");
}

// What get_inputs asks for.
struct Signature {
  DataTypeVector dtypes;
  // Leading dimension 1, as a request has it; empty if nothing is known.
  std::vector<PartialTensorShape> request_shapes;

  bool operator==(const Signature& other) const {
    return dtypes == other.dtypes &&
           std::equal(
               request_shapes.begin(), request_shapes.end(),
               other.request_shapes.begin(), other.request_shapes.end(),
               [](const auto& a, const auto& b) { return a.IsIdenticalTo(b); });
  }
};

// For messages: "(float[1,3], int32[1])".
template <typename Shape>
std::string Describe(const DataTypeVector& dtypes,
                     const std::vector<Shape>& shapes) {
  std::vector<std::string> parts;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    parts.push_back(
        absl::StrCat(DataTypeString(dtypes[i]),
                     i < shapes.size() ? shapes[i].DebugString() : ""));
  }
  return absl::StrCat("(", absl::StrJoin(parts, ", "), ")");
}

std::string Describe(const Signature& signature) {
  return Describe(signature.dtypes, signature.request_shapes);
}

std::string Describe(const std::vector<Tensor>& tensors) {
  DataTypeVector dtypes;
  std::vector<TensorShape> shapes;
  for (const Tensor& tensor : tensors) {
    dtypes.push_back(tensor.dtype());
    shapes.push_back(tensor.shape());
  }
  return Describe(dtypes, shapes);
}

std::string Describe(const DataTypeVector& dtypes) {
  return Describe(dtypes, std::vector<TensorShape>());
}

bool HaveTypes(const std::vector<Tensor>& tensors,
               const DataTypeVector& dtypes) {
  return std::equal(tensors.begin(), tensors.end(), dtypes.begin(),
                    dtypes.end(), [](const Tensor& tensor, DataType dtype) {
                      return tensor.dtype() == dtype;
                    });
}

bool IsAlike(const Tensor& a, const Tensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape();
}

// An op that waits in the batcher, holding no thread.
struct Waiter {
  Waiter(OpKernelContext* ctx, AsyncOpKernel::DoneCallback done)
      : ctx(ctx), done(std::move(done)) {}

  OpKernelContext* const ctx;  // Valid until `done` is called.
  AsyncOpKernel::DoneCallback done;
  CancellationToken token = CancellationManager::kInvalidToken;
  bool claimed = false;  // Guarded by the batcher's mutex.
};

// A compute op.
struct Request : Waiter {
  using Waiter::Waiter;

  std::vector<Tensor> inputs;
  DataTypeVector output_dtypes;
  Clock::time_point arrival;
};

// A get_inputs op.
struct Taker : Waiter {
  using Waiter::Waiter;

  Signature signature;
  int64_t owner = kNoOwner;
};

// A request and its place in the batch.
struct Row {
  int64_t index;
  std::shared_ptr<Request> request;
};

// A batch that was handed out and not answered yet.
struct Computation {
  int64_t owner;
  DataTypeVector output_dtypes;
  std::vector<std::shared_ptr<Request>> requests;
};

// A batch on its way to its taker.
struct Batch {
  int64_t id;
  std::shared_ptr<Taker> taker;
  std::vector<std::shared_ptr<Request>> requests;
};

bool Claim(Waiter* waiter) { return !std::exchange(waiter->claimed, true); }

// Ends the wait of a waiter that the calling thread has claimed.
void Finish(Waiter* waiter, const absl::Status& status) {
  // Trying is enough: a callback that runs already finds the waiter claimed.
  // Waiting for it might deadlock, for this may be the callback.
  if (CancellationManager* manager = waiter->ctx->cancellation_manager()) {
    manager->TryDeregisterCallback(waiter->token);
  }
  if (!status.ok()) waiter->ctx->SetStatus(status);
  AsyncOpKernel::DoneCallback done = std::move(waiter->done);
  done();
}

int64_t RowBytes(const Tensor& tensor) {
  return tensor.TotalBytes() / tensor.dim_size(0);
}

void CopyRow(const Tensor& source, int64_t source_row, Tensor* target,
             int64_t target_row) {
  const int64_t elements = source.NumElements() / source.dim_size(0);
  if (elements == 0) return;
  if (source.dtype() == DT_STRING) {
    std::copy_n(
        static_cast<const tstring*>(source.data()) + source_row * elements,
        elements,
        static_cast<tstring*>(target->data()) + target_row * elements);
    return;
  }
  const int64_t bytes = elements * DataTypeSize(source.dtype());
  std::memcpy(static_cast<char*>(target->data()) + target_row * bytes,
              static_cast<const char*>(source.data()) + source_row * bytes,
              bytes);
}

// Calls `copy(row)` for each row, on several threads if it's worth it.
void ForEachRow(OpKernelContext* ctx, int64_t rows, int64_t bytes_per_row,
                const std::function<void(int64_t)>& copy) {
  constexpr int64_t kBytesPerCycle = 4;
  ctx->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
      rows, 1 + bytes_per_row / kBytesPerCycle,
      [&copy](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) copy(row);
      });
}

// Makes the inputs of all requests, one below the other, the taker's outputs.
absl::Status Concatenate(const Batch& batch) {
  OpKernelContext* ctx = batch.taker->ctx;
  const int64_t rows = batch.requests.size();
  const std::vector<Tensor>& first = batch.requests[0]->inputs;
  if (rows == 1) {
    for (size_t i = 0; i < first.size(); ++i) ctx->set_output(i, first[i]);
    return absl::OkStatus();
  }
  std::vector<Tensor*> outputs(first.size());
  int64_t bytes_per_row = 0;
  for (size_t i = 0; i < first.size(); ++i) {
    TensorShape shape = first[i].shape();
    shape.set_dim(0, rows);
    TF_RETURN_IF_ERROR(ctx->allocate_output(i, shape, &outputs[i]));
    bytes_per_row += first[i].TotalBytes();
  }
  ForEachRow(ctx, rows, bytes_per_row, [&batch, &outputs](int64_t row) {
    for (size_t i = 0; i < outputs.size(); ++i) {
      CopyRow(batch.requests[row]->inputs[i], 0, outputs[i], row);
    }
  });
  return absl::OkStatus();
}

absl::Status SetComputationId(const Batch& batch) {
  Tensor* id;
  TF_RETURN_IF_ERROR(batch.taker->ctx->allocate_output(
      batch.taker->signature.dtypes.size(), TensorShape({}), &id));
  id->scalar<int64_t>()() = batch.id;
  return absl::OkStatus();
}

// Makes a row of `outputs` the outputs of its request.
absl::Status SetRow(const Row& row, const std::vector<Tensor>& outputs) {
  OpKernelContext* ctx = row.request->ctx;
  for (size_t i = 0; i < outputs.size(); ++i) {
    Tensor alias = outputs[i].Slice(row.index, row.index + 1);
    if (outputs[i].dim_size(0) == 1 ||
        (RowBytes(outputs[i]) >= kMinAliasedBytes && alias.IsAligned())) {
      ctx->set_output(i, alias);
      continue;
    }
    Tensor* copy;
    TF_RETURN_IF_ERROR(ctx->allocate_output(i, alias.shape(), &copy));
    CopyRow(outputs[i], row.index, copy, 0);
  }
  return absl::OkStatus();
}

void Answer(OpKernelContext* ctx, const std::vector<Row>& rows,
            const std::vector<Tensor>& outputs) {
  int64_t bytes_per_row = 0;
  for (const Tensor& output : outputs) bytes_per_row += RowBytes(output);
  std::vector<absl::Status> statuses(rows.size());
  ForEachRow(ctx, rows.size(), bytes_per_row,
             [&](int64_t i) { statuses[i] = SetRow(rows[i], outputs); });
  for (size_t i = 0; i < rows.size(); ++i) {
    Finish(rows[i].request.get(), statuses[i]);
  }
}

void FailAll(const std::vector<Row>& rows, const absl::Status& status) {
  for (const Row& row : rows) Finish(row.request.get(), status);
}

absl::Status CheckOutputs(const std::vector<Tensor>& outputs,
                          const Computation& computation) {
  const int64_t size = computation.requests.size();
  const bool have_batch_dimension =
      std::all_of(outputs.begin(), outputs.end(), [size](const Tensor& output) {
        return output.dims() > 0 && output.dim_size(0) == size;
      });
  if (have_batch_dimension && HaveTypes(outputs, computation.output_dtypes)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "Bad outputs of a batch: expected ", Describe(computation.output_dtypes),
      ", each with leading dimension ", size, " (the size of the batch), but ",
      "saw ", Describe(outputs), "."));
}

struct Options {
  int64_t minimum_batch_size;
  int64_t maximum_batch_size;
  int64_t timeout_ms;  // -1: none.

  bool operator==(const Options& other) const {
    return minimum_batch_size == other.minimum_batch_size &&
           maximum_batch_size == other.maximum_batch_size &&
           timeout_ms == other.timeout_ms;
  }
};

struct Statistics {
  int64_t batches = 0;
  int64_t requests = 0;
  double wait_seconds = 0;
};

// Matches requests with takers; see the top of the file.
class Batcher : public ResourceBase {
 public:
  explicit Batcher(const Options& options) : options_(options) {}

  std::string DebugString() const override {
    return absl::StrCat("DynamicBatcher(", options_.minimum_batch_size, ", ",
                        options_.maximum_batch_size, ", ", options_.timeout_ms,
                        ")");
  }

  const Options& options() const { return options_; }

  void Compute(const std::shared_ptr<Request>& request) TF_LOCKS_EXCLUDED(mu_);
  void GetInputs(const std::shared_ptr<Taker>& taker) TF_LOCKS_EXCLUDED(mu_);
  absl::Status SetOutputs(OpKernelContext* ctx, int64_t id,
                          const std::vector<Tensor>& outputs)
      TF_LOCKS_EXCLUDED(mu_);
  // Fails the computation that `owner` took last. Returns false if there is no
  // such computation, its outputs were set or the batcher is closed.
  bool Fail(int64_t owner, const absl::Status& status) TF_LOCKS_EXCLUDED(mu_);
  void Close() TF_LOCKS_EXCLUDED(mu_);
  Statistics statistics() TF_LOCKS_EXCLUDED(mu_);
  // Called by the alarm clock.
  void OnAlarm() TF_LOCKS_EXCLUDED(mu_);

 private:
  struct Rejection {
    std::shared_ptr<Request> request;
    absl::Status status;
  };

  bool StartWait(const std::shared_ptr<Waiter>& waiter) TF_LOCKS_EXCLUDED(mu_);
  void Cancel(const std::shared_ptr<Waiter>& waiter) TF_LOCKS_EXCLUDED(mu_);

  absl::Status Admit(const std::shared_ptr<Request>& request)
      TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Admit(const std::shared_ptr<Taker>& taker)
      TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckSignature(const Request& request)
      TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Rejection> RejectUnfit() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Clock::time_point Deadline() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsReady() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SetAlarm() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Batch> TakeReady() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Register(const Batch& batch) TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void HandOver(const Batch& batch) TF_LOCKS_EXCLUDED(mu_);
  std::vector<Row> ClaimRows(const Computation& computation)
      TF_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FailComputation(int64_t id, const absl::Status& status)
      TF_LOCKS_EXCLUDED(mu_);

  const Options options_;
  absl::Mutex mu_;
  bool closed_ TF_GUARDED_BY(mu_) = false;
  bool alarm_is_set_ TF_GUARDED_BY(mu_) = false;
  int64_t next_id_ TF_GUARDED_BY(mu_) = 0;
  Statistics statistics_ TF_GUARDED_BY(mu_);
  // Of the first get_inputs; all others must ask for the same.
  std::optional<Signature> signature_ TF_GUARDED_BY(mu_);
  // All alike, so that any of them can be batched.
  std::list<std::shared_ptr<Request>> waiting_ TF_GUARDED_BY(mu_);
  std::list<std::shared_ptr<Taker>> takers_ TF_GUARDED_BY(mu_);
  std::unordered_map<int64_t, Computation> running_ TF_GUARDED_BY(mu_);
  // The last computation of each owner, unless its outputs were set well.
  std::unordered_map<int64_t, int64_t> taken_by_ TF_GUARDED_BY(mu_);
};

// Wakes batchers at their deadlines. One thread serves the whole process; it
// starts with the first alarm and holds no batcher alive.
class AlarmClock {
 public:
  static AlarmClock* Get() {
    static AlarmClock* clock = new AlarmClock;  // Never destroyed.
    return clock;
  }

  void Set(Clock::time_point time, core::WeakPtr<Batcher> batcher) {
    absl::MutexLock lock(&mu_);
    alarms_.emplace(time, std::move(batcher));
    if (thread_ == nullptr) {
      thread_.reset(Env::Default()->StartThread(
          ThreadOptions(), "dynamic_batching_alarm", [this] { Run(); }));
    }
    changed_.Signal();
  }

 private:
  void Run() {
    while (true) {
      core::RefCountPtr<Batcher> batcher = WaitForNext().GetNewRef();
      if (batcher != nullptr) batcher->OnAlarm();
    }
  }

  core::WeakPtr<Batcher> WaitForNext() {
    absl::MutexLock lock(&mu_);
    while (alarms_.empty() || alarms_.begin()->first > Clock::now()) {
      if (alarms_.empty()) {
        changed_.Wait(&mu_);
      } else {
        changed_.WaitWithTimeout(
            &mu_, absl::FromChrono(alarms_.begin()->first - Clock::now()));
      }
    }
    return std::move(alarms_.extract(alarms_.begin()).mapped());
  }

  absl::Mutex mu_;
  absl::CondVar changed_;
  std::multimap<Clock::time_point, core::WeakPtr<Batcher>> alarms_
      TF_GUARDED_BY(mu_);
  std::unique_ptr<Thread> thread_ TF_GUARDED_BY(mu_);
};

// Returns false if the waiter's step is cancelled already (the wait has ended
// then). After it the step may be cancelled at any time.
bool Batcher::StartWait(const std::shared_ptr<Waiter>& waiter) {
  CancellationManager* manager = waiter->ctx->cancellation_manager();
  if (manager == nullptr) return true;
  waiter->token = manager->get_cancellation_token();
  core::IntrusivePtr<Batcher> self(this, /*add_ref=*/true);
  if (manager->RegisterCallback(waiter->token,
                                [self, waiter] { self->Cancel(waiter); })) {
    return true;
  }
  Finish(waiter.get(), absl::CancelledError("The step was cancelled."));
  return false;
}

void Batcher::Cancel(const std::shared_ptr<Waiter>& waiter) {
  {
    absl::MutexLock lock(&mu_);
    if (!Claim(waiter.get())) return;
    waiting_.remove_if([&](const auto& request) { return request == waiter; });
    takers_.remove_if([&](const auto& taker) { return taker == waiter; });
  }
  Finish(waiter.get(),
         absl::CancelledError("The step was cancelled while it waited in the "
                              "batcher."));
}

void Batcher::Compute(const std::shared_ptr<Request>& request) {
  if (!StartWait(request)) return;
  absl::Status status;
  std::optional<Batch> batch;
  {
    absl::MutexLock lock(&mu_);
    if (request->claimed) return;
    status = Admit(request);
    if (status.ok()) {
      batch = TakeReady();
    } else {
      Claim(request.get());
    }
  }
  if (!status.ok()) Finish(request.get(), status);
  if (batch) HandOver(*batch);
}

void Batcher::GetInputs(const std::shared_ptr<Taker>& taker) {
  if (!StartWait(taker)) return;
  absl::Status status;
  std::vector<Rejection> rejections;
  std::optional<Batch> batch;
  {
    absl::MutexLock lock(&mu_);
    if (taker->claimed) return;
    status = Admit(taker);
    if (status.ok()) {
      rejections = RejectUnfit();
      batch = TakeReady();
    } else {
      Claim(taker.get());
    }
  }
  if (!status.ok()) Finish(taker.get(), status);
  for (const Rejection& rejection : rejections) {
    Finish(rejection.request.get(), rejection.status);
  }
  if (batch) HandOver(*batch);
}

absl::Status Batcher::SetOutputs(OpKernelContext* ctx, int64_t id,
                                 const std::vector<Tensor>& outputs) {
  absl::Status status;
  std::vector<Row> rows;
  {
    absl::MutexLock lock(&mu_);
    if (closed_) return ClosedError();
    auto found = running_.find(id);
    if (found == running_.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("No computation with id ", id, " is running: expected ",
                       "an id from get_inputs that was not answered yet."));
    }
    const Computation& computation = found->second;
    status = CheckOutputs(outputs, computation);
    rows = ClaimRows(computation);
    if (status.ok()) taken_by_.erase(computation.owner);
    running_.erase(found);
  }
  if (status.ok()) {
    Answer(ctx, rows, outputs);
  } else {
    FailAll(rows, status);
  }
  return status;
}

bool Batcher::Fail(int64_t owner, const absl::Status& status) {
  int64_t id;
  {
    absl::MutexLock lock(&mu_);
    auto found = taken_by_.find(owner);
    if (found == taken_by_.end()) return false;
    id = found->second;
    taken_by_.erase(found);
  }
  FailComputation(id, status);
  return true;
}

void Batcher::Close() {
  std::vector<std::shared_ptr<Waiter>> waiters;
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    waiters.assign(waiting_.begin(), waiting_.end());
    waiters.insert(waiters.end(), takers_.begin(), takers_.end());
    for (const auto& waiter : waiters) Claim(waiter.get());
    for (const auto& running : running_) {
      for (const Row& row : ClaimRows(running.second)) {
        waiters.push_back(row.request);
      }
    }
    waiting_.clear();
    takers_.clear();
    running_.clear();
    taken_by_.clear();
  }
  for (const auto& waiter : waiters) Finish(waiter.get(), ClosedError());
}

Statistics Batcher::statistics() {
  absl::MutexLock lock(&mu_);
  return statistics_;
}

void Batcher::OnAlarm() {
  std::optional<Batch> batch;
  {
    absl::MutexLock lock(&mu_);
    alarm_is_set_ = false;
    batch = TakeReady();
  }
  if (!batch) return;
  // On a thread of its own, for the other batchers need the alarm clock's.
  core::IntrusivePtr<Batcher> self(this, /*add_ref=*/true);
  Env::Default()->SchedClosure(
      [self, batch = *std::move(batch)] { self->HandOver(batch); });
}

absl::Status Batcher::Admit(const std::shared_ptr<Request>& request) {
  if (closed_) return ClosedError();
  TF_RETURN_IF_ERROR(CheckSignature(*request));
  if (!waiting_.empty()) {
    const Request& first = *waiting_.front();
    const auto& inputs = request->inputs;
    if (!std::equal(inputs.begin(), inputs.end(), first.inputs.begin(),
                    first.inputs.end(), IsAlike) ||
        request->output_dtypes != first.output_dtypes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "A request is unlike its batch: expected inputs ",
          Describe(first.inputs), " and outputs ",
          Describe(first.output_dtypes), ", but saw ", Describe(inputs),
          " and ", Describe(request->output_dtypes), "."));
    }
  }
  request->arrival = Clock::now();
  waiting_.push_back(request);
  return absl::OkStatus();
}

absl::Status Batcher::Admit(const std::shared_ptr<Taker>& taker) {
  if (closed_) return ClosedError();
  if (!signature_) signature_ = taker->signature;
  if (!(taker->signature == *signature_)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "All get_inputs of a batcher must ask for the same: expected ",
        Describe(*signature_), ", but saw ", Describe(taker->signature), "."));
  }
  takers_.push_back(taker);
  return absl::OkStatus();
}

absl::Status Batcher::CheckSignature(const Request& request) {
  if (!signature_) return absl::OkStatus();
  bool fits = HaveTypes(request.inputs, signature_->dtypes);
  for (size_t i = 0; fits && i < signature_->request_shapes.size(); ++i) {
    fits = signature_->request_shapes[i].IsCompatibleWith(
        request.inputs[i].shape());
  }
  if (fits) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("Bad inputs of a request: expected ", Describe(*signature_),
                   ", but saw ", Describe(request.inputs), "."));
}

// Requests that came before the first get_inputs were admitted unchecked.
std::vector<Batcher::Rejection> Batcher::RejectUnfit() {
  std::vector<Rejection> rejections;
  if (statistics_.batches > 0) return rejections;
  for (auto i = waiting_.begin(); i != waiting_.end();) {
    absl::Status status = CheckSignature(**i);
    if (status.ok()) {
      ++i;
      continue;
    }
    Claim(i->get());
    rejections.push_back({*i, status});
    i = waiting_.erase(i);
  }
  return rejections;
}

Clock::time_point Batcher::Deadline() {
  return waiting_.front()->arrival +
         std::chrono::milliseconds(options_.timeout_ms);
}

bool Batcher::IsReady() {
  const int64_t size = waiting_.size();
  if (size >= options_.minimum_batch_size) return true;
  return options_.timeout_ms >= 0 && Clock::now() >= Deadline();
}

// At most one alarm per batcher is set at a time. If its request is gone when
// it rings, it's set anew for the one that is the first then.
void Batcher::SetAlarm() {
  if (options_.timeout_ms < 0 || alarm_is_set_) return;
  alarm_is_set_ = true;
  AlarmClock::Get()->Set(Deadline(), core::WeakPtr<Batcher>(this));
}

// Whatever makes a batch ready (a request, a taker, the alarm) makes only one
// ready, for afterwards either no taker or too few requests wait.
std::optional<Batch> Batcher::TakeReady() {
  if (takers_.empty() || waiting_.empty()) return std::nullopt;
  if (!IsReady()) {
    SetAlarm();
    return std::nullopt;
  }
  Batch batch{next_id_++, takers_.front(), {}};
  Claim(batch.taker.get());
  takers_.pop_front();
  auto end = waiting_.begin();
  std::advance(end,
               std::min<int64_t>(waiting_.size(), options_.maximum_batch_size));
  batch.requests.assign(waiting_.begin(), end);
  waiting_.erase(waiting_.begin(), end);
  Register(batch);
  return batch;
}

void Batcher::Register(const Batch& batch) {
  const int64_t owner = batch.taker->owner;
  running_[batch.id] = {owner, batch.requests[0]->output_dtypes,
                        batch.requests};
  if (owner != kNoOwner) taken_by_[owner] = batch.id;
  const Clock::time_point now = Clock::now();
  ++statistics_.batches;
  statistics_.requests += batch.requests.size();
  for (const auto& request : batch.requests) {
    statistics_.wait_seconds +=
        std::chrono::duration<double>(now - request->arrival).count();
  }
}

void Batcher::HandOver(const Batch& batch) {
  absl::Status status = Concatenate(batch);
  if (status.ok()) status = SetComputationId(batch);
  // The computation holds the requests, but nobody needs their inputs now.
  for (const auto& request : batch.requests) request->inputs.clear();
  if (!status.ok()) FailComputation(batch.id, status);
  Finish(batch.taker.get(), status);
}

std::vector<Row> Batcher::ClaimRows(const Computation& computation) {
  std::vector<Row> rows;
  for (size_t i = 0; i < computation.requests.size(); ++i) {
    const std::shared_ptr<Request>& request = computation.requests[i];
    if (Claim(request.get()))
      rows.push_back({static_cast<int64_t>(i), request});
  }
  return rows;
}

// Does nothing if the computation was answered or closed meanwhile.
void Batcher::FailComputation(int64_t id, const absl::Status& status) {
  std::vector<Row> rows;
  {
    absl::MutexLock lock(&mu_);
    auto found = running_.find(id);
    if (found == running_.end()) return;
    rows = ClaimRows(found->second);
    running_.erase(found);
  }
  FailAll(rows, status);
}

absl::Status CheckOptions(const Options& options) {
  if (options.minimum_batch_size >= 1 &&
      options.maximum_batch_size >= options.minimum_batch_size &&
      options.timeout_ms >= -1 && options.timeout_ms <= kMaxTimeoutMs) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "Bad options of a batcher: expected 1 <= minimum_batch_size <= "
      "maximum_batch_size and -1 <= timeout_ms <= ",
      kMaxTimeoutMs,
      ", but saw minimum_batch_size=", options.minimum_batch_size,
      ", maximum_batch_size=", options.maximum_batch_size,
      ", timeout_ms=", options.timeout_ms, "."));
}

absl::Status CheckCopyable(const DataTypeVector& dtypes) {
  for (DataType dtype : dtypes) {
    if (dtype != DT_STRING && !DataTypeCanUseMemcpy(dtype)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Tensors of type ", DataTypeString(dtype), " can't be batched."));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckIsSingle(const std::vector<Tensor>& inputs) {
  for (const Tensor& input : inputs) {
    if (input.dims() > 0 && input.dim_size(0) == 1) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "Bad inputs of a request: expected each with leading (batch) dimension "
        "1, but saw ",
        Describe(inputs), "."));
  }
  return absl::OkStatus();
}

absl::Status FindBatcher(OpKernelContext* ctx,
                         core::RefCountPtr<Batcher>* batcher) {
  return LookupResource(ctx, HandleFromInput(ctx, 0), batcher);
}

absl::Status ReadList(OpKernelContext* ctx, const char* name,
                      std::vector<Tensor>* tensors) {
  OpInputList list;
  TF_RETURN_IF_ERROR(ctx->input_list(name, &list));
  tensors->assign(list.begin(), list.end());
  return absl::OkStatus();
}

template <typename T>
absl::Status ReadScalar(OpKernelContext* ctx, const char* name, T* value) {
  const Tensor* tensor;
  TF_RETURN_IF_ERROR(ctx->input(name, &tensor));
  if (!TensorShapeUtils::IsScalar(tensor->shape())) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, " must be a scalar, but saw shape ",
                     tensor->shape().DebugString(), "."));
  }
  *value = tensor->scalar<T>()();
  return absl::OkStatus();
}

AsyncOpKernel::DoneCallback HoldWhileWaiting(Batcher* batcher,
                                             AsyncOpKernel::DoneCallback done) {
  core::IntrusivePtr<Batcher> reference(batcher, /*add_ref=*/true);
  return [reference, done = std::move(done)] { done(); };
}

class BatcherOp : public ResourceOpKernel<Batcher> {
 public:
  explicit BatcherOp(OpKernelConstruction* ctx)
      : ResourceOpKernel<Batcher>(ctx) {
    OP_REQUIRES_OK(
        ctx, ctx->GetAttr("minimum_batch_size", &options_.minimum_batch_size));
    OP_REQUIRES_OK(
        ctx, ctx->GetAttr("maximum_batch_size", &options_.maximum_batch_size));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("timeout_ms", &options_.timeout_ms));
    OP_REQUIRES_OK(ctx, CheckOptions(options_));
  }

 private:
  absl::Status CreateResource(Batcher** batcher) override {
    *batcher = new Batcher(options_);
    return absl::OkStatus();
  }

  absl::Status VerifyResource(Batcher* batcher) override {
    if (batcher->options() == options_) return absl::OkStatus();
    return absl::InvalidArgumentError(
        "Another batcher with this shared_name has other options.");
  }

  Options options_;
};

class ComputeOp : public AsyncOpKernel {
 public:
  explicit ComputeOp(OpKernelConstruction* ctx) : AsyncOpKernel(ctx) {
    DataTypeVector input_dtypes;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Tinputs", &input_dtypes));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Toutputs", &output_dtypes_));
    OP_REQUIRES_OK(ctx, CheckCopyable(input_dtypes));
    OP_REQUIRES_OK(ctx, CheckCopyable(output_dtypes_));
  }

  // Not worth a thread of its own: only what completes a batch copies it.
  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK_ASYNC(ctx, FindBatcher(ctx, &batcher), done);
    std::vector<Tensor> inputs;
    OP_REQUIRES_OK_ASYNC(ctx, ReadList(ctx, "inputs", &inputs), done);
    OP_REQUIRES_OK_ASYNC(ctx, CheckIsSingle(inputs), done);
    auto request = std::make_shared<Request>(
        ctx, HoldWhileWaiting(batcher.get(), std::move(done)));
    request->inputs = std::move(inputs);
    request->output_dtypes = output_dtypes_;
    batcher->Compute(request);
  }

 private:
  DataTypeVector output_dtypes_;
};

class GetInputsOp : public AsyncOpKernel {
 public:
  explicit GetInputsOp(OpKernelConstruction* ctx) : AsyncOpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("Tinputs", &signature_.dtypes));
    OP_REQUIRES_OK(ctx,
                   ctx->GetAttr("input_shapes", &signature_.request_shapes));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("owner", &owner_));
    for (PartialTensorShape& shape : signature_.request_shapes) {
      if (shape.dims() > 0) shape.set_dim(0, 1);
    }
  }

  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK_ASYNC(ctx, FindBatcher(ctx, &batcher), done);
    auto taker = std::make_shared<Taker>(
        ctx, HoldWhileWaiting(batcher.get(), std::move(done)));
    taker->signature = signature_;
    taker->owner = owner_;
    batcher->GetInputs(taker);
  }

 private:
  Signature signature_;
  int64_t owner_;
};

class SetOutputsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK(ctx, FindBatcher(ctx, &batcher));
    std::vector<Tensor> outputs;
    OP_REQUIRES_OK(ctx, ReadList(ctx, "outputs", &outputs));
    int64_t id = 0;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "computation_id", &id));
    OP_REQUIRES_OK(ctx, batcher->SetOutputs(ctx, id, outputs));
  }
};

class FailOp : public OpKernel {
 public:
  explicit FailOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("owner", &owner_));
  }

  void Compute(OpKernelContext* ctx) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK(ctx, FindBatcher(ctx, &batcher));
    int32_t code = 0;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "code", &code));
    tstring message;
    OP_REQUIRES_OK(ctx, ReadScalar(ctx, "message", &message));
    const absl::Status status(static_cast<absl::StatusCode>(code), message);
    OP_REQUIRES(ctx, !status.ok(),
                absl::InvalidArgumentError("code must be that of an error."));
    ctx->set_output(0, Tensor(batcher->Fail(owner_, status)));
  }

 private:
  int64_t owner_;
};

class CloseOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK(ctx, FindBatcher(ctx, &batcher));
    batcher->Close();
  }
};

class StatisticsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    core::RefCountPtr<Batcher> batcher;
    OP_REQUIRES_OK(ctx, FindBatcher(ctx, &batcher));
    const Statistics statistics = batcher->statistics();
    ctx->set_output(0, Tensor(statistics.batches));
    ctx->set_output(1, Tensor(statistics.requests));
    ctx->set_output(2, Tensor(statistics.wait_seconds));
  }
};

// Sets the first `count` outputs' shapes to the attribute's, if it has any.
absl::Status SetShapesFromAttribute(InferenceContext* c, const char* attribute,
                                    int count) {
  std::vector<PartialTensorShape> shapes;
  TF_RETURN_IF_ERROR(c->GetAttr(attribute, &shapes));
  if (shapes.empty()) shapes.resize(count);
  if (static_cast<int>(shapes.size()) != count) {
    return absl::InvalidArgumentError(
        absl::StrCat(attribute, " must be empty or have ", count,
                     " entries, but saw ", shapes.size(), "."));
  }
  for (int i = 0; i < count; ++i) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(c->MakeShapeFromPartialTensorShape(shapes[i], &shape));
    c->set_output(i, shape);
  }
  return absl::OkStatus();
}

absl::Status ComputeShapes(InferenceContext* c) {
  for (int i = 1; i < c->num_inputs(); ++i) {
    ShapeHandle input;
    shape_inference::DimensionHandle one;
    TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(i), 1, &input));
    TF_RETURN_IF_ERROR(c->WithValue(c->Dim(input, 0), 1, &one));
  }
  return SetShapesFromAttribute(c, "output_shapes", c->num_outputs());
}

absl::Status GetInputsShapes(InferenceContext* c) {
  const int inputs = c->num_outputs() - 1;
  c->set_output(inputs, c->Scalar());
  return SetShapesFromAttribute(c, "input_shapes", inputs);
}

absl::Status SetOutputsShapes(InferenceContext* c) {
  ShapeHandle id;
  return c->WithRank(c->input(c->num_inputs() - 1), 0, &id);
}

absl::Status AllScalars(InferenceContext* c) {
  for (int i = 0; i < c->num_outputs(); ++i) c->set_output(i, c->Scalar());
  return absl::OkStatus();
}

REGISTER_OP("DynamicBatcher")
    .Output("handle: resource")
    .Attr("minimum_batch_size: int")
    .Attr("maximum_batch_size: int")
    .Attr("timeout_ms: int")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .SetIsStateful()
    .SetShapeFn(AllScalars)
    .Doc(R"doc(
Makes a batcher. A timeout_ms of -1 means that batches wait for ever.
)doc");

REGISTER_OP("DynamicBatcherCompute")
    .Input("handle: resource")
    .Input("inputs: Tinputs")
    .Output("outputs: Toutputs")
    .Attr("Tinputs: list(type) >= 1")
    .Attr("Toutputs: list(type) >= 1")
    .Attr("output_shapes: list(shape) = []")
    .SetIsStateful()
    .SetShapeFn(ComputeShapes)
    .Doc(R"doc(
Waits until the inputs (leading dimension 1) were computed as part of a batch.
)doc");

REGISTER_OP("DynamicBatcherGetInputs")
    .Input("handle: resource")
    .Output("inputs: Tinputs")
    .Output("computation_id: int64")
    .Attr("Tinputs: list(type) >= 1")
    .Attr("input_shapes: list(shape) = []")
    .Attr("owner: int = -1")
    .SetIsStateful()
    .SetShapeFn(GetInputsShapes)
    .Doc(R"doc(
Waits for a batch. owner, if not -1, is the name for DynamicBatcherFail.
)doc");

REGISTER_OP("DynamicBatcherSetOutputs")
    .Input("handle: resource")
    .Input("outputs: Toutputs")
    .Input("computation_id: int64")
    .Attr("Toutputs: list(type) >= 1")
    .SetIsStateful()
    .SetShapeFn(SetOutputsShapes)
    .Doc(R"doc(
Hands the rows of the outputs to the requests of a computation.
)doc");

REGISTER_OP("DynamicBatcherFail")
    .Input("handle: resource")
    .Input("code: int32")
    .Input("message: string")
    .Output("failed: bool")
    .Attr("owner: int")
    .SetIsStateful()
    .SetShapeFn(AllScalars)
    .Doc(R"doc(
Fails the requests of the last computation of the owner with the error, unless
its outputs were set. failed tells whether there was such a computation.
)doc");

REGISTER_OP("DynamicBatcherClose")
    .Input("handle: resource")
    .SetIsStateful()
    .SetShapeFn(shape_inference::NoOutputs)
    .Doc(R"doc(
Ends all waiting in the batcher, now and later, with a Cancelled error.
)doc");

REGISTER_OP("DynamicBatcherStatistics")
    .Input("handle: resource")
    .Output("batches: int64")
    .Output("requests: int64")
    .Output("wait_seconds: double")
    .SetIsStateful()
    .SetShapeFn(AllScalars)
    .Doc(R"doc(
Totals since the batcher was made.
)doc");

REGISTER_KERNEL_BUILDER(Name("DynamicBatcher").Device(DEVICE_CPU), BatcherOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherCompute").Device(DEVICE_CPU),
                        ComputeOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherGetInputs").Device(DEVICE_CPU),
                        GetInputsOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherSetOutputs").Device(DEVICE_CPU),
                        SetOutputsOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherFail").Device(DEVICE_CPU), FailOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherClose").Device(DEVICE_CPU),
                        CloseOp);
REGISTER_KERNEL_BUILDER(Name("DynamicBatcherStatistics").Device(DEVICE_CPU),
                        StatisticsOp);

}  // namespace
}  // namespace dynamic_batching
}  // namespace tensorflow
