// Licensed under the Apache License, Version 2.0; see LICENSE.
//
// Calls into environment processes as an asynchronous TensorFlow op.
//
// The life of a call:
//   1. `PyProcessCall` finds the channel of its process, joins the channel's
//      queue and returns: no TensorFlow thread waits for the process.
//   2. When it is the first in the queue, its arguments are written to the
//      memory shared with the process, and the sizes of the message are sent
//      through a socket to ring the bell.
//   3. The process reads the message, runs the method, writes the result over
//      the arguments and rings back.
//   4. One thread, waiting on the sockets of all processes, copies the result
//      into tensors, finishes the op and starts the channel's next call.
//
// The end of the process closes the socket, which fails the calls of its
// channel. A cancelled step abandons its call: the answer is dropped when it
// comes. `py_process.py` documents the layout of a message and starts and
// restarts the processes; it opens and closes channels, and asks for calls that
// take too long, through the C functions at the end of this file.

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/mutex.h"

namespace impala {
namespace {

using tensorflow::AsyncOpKernel;
using tensorflow::CancellationManager;
using tensorflow::CancellationToken;
using tensorflow::DataType;
using tensorflow::mutex;
using tensorflow::mutex_lock;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::PartialTensorShape;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::tstring;
namespace errors = tensorflow::errors;

constexpr size_t kWord = sizeof(int64_t);

size_t Padded(size_t size) { return (size + kWord - 1) / kWord * kWord; }

// The bell: what is sent through the socket for each message.
struct Bell {
  int64_t header_size;
  int64_t size;  // Of the header and the data.
};

// Collects a message, and writes it once its size is known.
class Writer {
 public:
  void Word(int64_t value) { header_.push_back(value); }

  void String(const std::string& value) {
    Word(value.size());
    const size_t begin = header_.size();
    header_.resize(begin + Padded(value.size()) / kWord);
    memcpy(header_.data() + begin, value.data(), value.size());
  }

  // Refers to the tensor, which must live until the message is written.
  void Array(const Tensor& tensor) {
    Word(tensor.dtype());
    Word(tensor.dims());
    for (int i = 0; i < tensor.dims(); ++i) Word(tensor.dim_size(i));
    if (tensor.dtype() == tensorflow::DT_STRING) {
      const auto strings = tensor.flat<tstring>();
      for (int64_t i = 0; i < strings.size(); ++i) Piece(strings(i));
    } else {
      Piece(tensor.tensor_data());
    }
  }

  Bell bell() const {
    const int64_t header_size = header_.size() * kWord;
    return {header_size, header_size + static_cast<int64_t>(data_size_)};
  }

  void Write(char* memory) const {
    memcpy(memory, header_.data(), header_.size() * kWord);
    memory += header_.size() * kWord;
    for (const absl::string_view piece : pieces_) {
      if (!piece.empty()) memcpy(memory, piece.data(), piece.size());
      memory += Padded(piece.size());
    }
  }

 private:
  void Piece(absl::string_view piece) {
    Word(piece.size());
    pieces_.push_back(piece);
    data_size_ += Padded(piece.size());
  }

  absl::InlinedVector<int64_t, 32> header_;
  absl::InlinedVector<absl::string_view, 8> pieces_;
  size_t data_size_ = 0;
};

// Reads a message. The process at the other end may be broken, so nothing it
// wrote is trusted.
class Reader {
 public:
  Reader(const char* memory, Bell bell)
      : header_{memory, static_cast<size_t>(bell.header_size)},
        data_{memory + bell.header_size,
              static_cast<size_t>(bell.size - bell.header_size)} {}

  absl::Status Word(int64_t* value) {
    absl::string_view bytes;
    TF_RETURN_IF_ERROR(Take(kWord, &header_, &bytes));
    memcpy(value, bytes.data(), kWord);
    return absl::OkStatus();
  }

  absl::Status String(absl::string_view* value) {
    int64_t size;
    TF_RETURN_IF_ERROR(Word(&size));
    return Take(size, &header_, value);
  }

  absl::Status ArrayType(DataType* dtype, TensorShape* shape) {
    int64_t type, dims;
    TF_RETURN_IF_ERROR(Word(&type));
    *dtype = static_cast<DataType>(type);
    TF_RETURN_IF_ERROR(Word(&dims));
    for (int64_t i = 0; i < dims; ++i) {
      int64_t dim;
      TF_RETURN_IF_ERROR(Word(&dim));
      TF_RETURN_IF_ERROR(shape->AddDimWithStatus(dim));
    }
    return absl::OkStatus();
  }

  absl::Status ArrayData(Tensor* tensor) {
    absl::string_view piece;
    if (tensor->dtype() == tensorflow::DT_STRING) {
      auto strings = tensor->flat<tstring>();
      for (int64_t i = 0; i < strings.size(); ++i) {
        TF_RETURN_IF_ERROR(Piece(&piece));
        strings(i).assign(piece.data(), piece.size());
      }
      return absl::OkStatus();
    }
    const auto target = tensor->tensor_data();
    TF_RETURN_IF_ERROR(Piece(&piece));
    if (piece.size() != target.size()) return Broken();
    if (!target.empty()) {
      memcpy(const_cast<char*>(target.data()), piece.data(), piece.size());
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Piece(absl::string_view* piece) {
    int64_t size;
    TF_RETURN_IF_ERROR(Word(&size));
    return Take(size, &data_, piece);
  }

  static absl::Status Take(int64_t size, absl::string_view* from,
                           absl::string_view* taken) {
    if (size < 0 || static_cast<size_t>(size) > from->size() ||
        Padded(size) > from->size()) {
      return Broken();
    }
    *taken = from->substr(0, size);
    from->remove_prefix(Padded(size));
    return absl::OkStatus();
  }

  static absl::Status Broken() {
    return errors::Internal("The environment process sent a broken message.");
  }

  absl::string_view header_;
  absl::string_view data_;
};

// The memory shared with a process. Whoever writes a message that does not fit
// grows the file; the other side follows when it hears of the message's size.
class SharedMemory {
 public:
  explicit SharedMemory(int fd) : fd_(fd) {}
  ~SharedMemory() {
    if (data_ != nullptr) munmap(data_, size_);
    close(fd_);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  absl::Status Reserve(size_t size) {
    if (size <= size_) return absl::OkStatus();
    struct stat file;
    if (fstat(fd_, &file) != 0) return Error("fstat");
    size_t file_size = file.st_size;
    if (file_size < size) {
      file_size = 2 * size;
      if (ftruncate(fd_, file_size) != 0) return Error("ftruncate");
    }
    void* data =
        mmap(nullptr, file_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (data == MAP_FAILED) return Error("mmap");
    if (data_ != nullptr) munmap(data_, size_);
    data_ = static_cast<char*>(data);
    size_ = file_size;
    return absl::OkStatus();
  }

  char* data() { return data_; }

 private:
  static absl::Status Error(const char* call) {
    return errors::ResourceExhausted(
        "No shared memory for an environment "
        "process: ",
        call, ": ", strerror(errno));
  }

  const int fd_;
  char* data_ = nullptr;
  size_t size_ = 0;
};

struct Call {
  OpKernelContext* context;
  AsyncOpKernel::DoneCallback done;
  const std::string* method;
  const std::vector<PartialTensorShape>* output_shapes;
  const std::vector<DataType>* output_types;
  CancellationToken token = CancellationManager::kInvalidToken;
  bool cancelled = false;  // Before it was queued; guarded by its channel.
};

absl::Status ReadResult(const Call& call, const char* memory, Bell bell) {
  Reader reader(memory, bell);
  absl::string_view error;
  int64_t num_dtypes, num_arrays;
  TF_RETURN_IF_ERROR(reader.String(&error));
  if (!error.empty()) {
    // The text that `failure` in py_process.py looks for.
    return errors::Unknown("An environment process raised in ", *call.method,
                           ":\n", error,
                           "\n(End of the environment's traceback.)");
  }
  TF_RETURN_IF_ERROR(reader.Word(&num_dtypes));  // Answers have none.
  TF_RETURN_IF_ERROR(reader.Word(&num_arrays));
  if (num_arrays != call.context->num_outputs()) {
    return errors::Internal(*call.method, " sent ", num_arrays, " arrays, not ",
                            call.context->num_outputs());
  }
  for (int i = 0; i < num_arrays; ++i) {
    DataType dtype;
    TensorShape shape;
    TF_RETURN_IF_ERROR(reader.ArrayType(&dtype, &shape));
    const PartialTensorShape& expected = (*call.output_shapes)[i];
    if (dtype != call.context->expected_output_dtype(i) ||
        !expected.IsCompatibleWith(shape)) {
      return errors::InvalidArgument(
          "Result ", i, " of ", *call.method, " is ",
          tensorflow::DataTypeString(dtype), shape.DebugString(),
          ", its _tensor_specs promise ",
          tensorflow::DataTypeString(call.context->expected_output_dtype(i)),
          expected.DebugString());
    }
    Tensor* output = nullptr;
    TF_RETURN_IF_ERROR(call.context->allocate_output(i, shape, &output));
    TF_RETURN_IF_ERROR(reader.ArrayData(output));
  }
  return absl::OkStatus();
}

void WriteRequest(const Call& call, Writer* writer) {
  writer->String(*call.method);
  writer->Word(call.output_types->size());
  for (const DataType type : *call.output_types) writer->Word(type);
  const int num_arguments = call.context->num_inputs() - 1;
  writer->Word(num_arguments);
  for (int i = 0; i < num_arguments; ++i) {
    writer->Array(call.context->input(i + 1));
  }
}

void Finish(Call* call, const absl::Status& status) {
  if (!status.ok()) call->context->SetStatus(status);
  call->done();
}

class Channel;

// The one thread that waits for the answers of all processes.
class Poller {
 public:
  static Poller* Get() {
    // Never destroyed: its thread may outlive main().
    static Poller* poller = new Poller;
    return poller;
  }

  // Calls OnReadable from now on, until the channel is gone. Returns 0 or an
  // error number.
  int Add(int socket, std::weak_ptr<Channel> channel, int64_t* key) {
    mutex_lock lock(mu_);
    if (!Start()) return errno;
    channels_[*key = ++last_key_] = std::move(channel);
    epoll_event event = {};
    // Edge-triggered: the end of a process is told once. That it may come along
    // with an answer and be missed does no harm, as then the next send fails.
    event.events = EPOLLIN | EPOLLET;
    event.data.u64 = *key;
    const int failed = epoll_ctl(epoll_, EPOLL_CTL_ADD, socket, &event);
    return failed ? errno : 0;
  }

  void Remove(int64_t key) {
    mutex_lock lock(mu_);
    channels_.erase(key);
  }

 private:
  Poller() = default;

  // There may be no descriptor left now, but one for the next channel.
  bool Start() TF_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (epoll_ >= 0) return true;
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ < 0) return false;
    thread_.reset(tensorflow::Env::Default()->StartThread(
        tensorflow::ThreadOptions(), "py_process_poller",
        [this, epoll = epoll_] { Loop(epoll); }));
    return true;
  }

  void Loop(int epoll);

  std::shared_ptr<Channel> Find(int64_t key) {
    mutex_lock lock(mu_);
    const auto it = channels_.find(key);
    return it == channels_.end() ? nullptr : it->second.lock();
  }

  mutex mu_;
  int epoll_ TF_GUARDED_BY(mu_) = -1;
  int64_t last_key_ TF_GUARDED_BY(mu_) = 0;
  std::unordered_map<int64_t, std::weak_ptr<Channel>> channels_
      TF_GUARDED_BY(mu_);
  std::unique_ptr<tensorflow::Thread> thread_;
};

// The calls of one process, in the order of their arrival.
class Channel : public std::enable_shared_from_this<Channel> {
 public:
  Channel(int socket, int memory_fd) : socket_(socket), memory_(memory_fd) {}

  ~Channel() {
    Poller::Get()->Remove(key_);
    close(socket_);
  }

  // Returns 0 or an error number.
  int Start() { return Poller::Get()->Add(socket_, weak_from_this(), &key_); }

  void Enqueue(std::shared_ptr<Call> call) {
    CancellationManager* manager = call->context->cancellation_manager();
    if (manager != nullptr) {
      call->token = manager->get_cancellation_token();
      const bool registered = manager->RegisterCallback(
          call->token,
          [channel = weak_from_this(), weak = std::weak_ptr<Call>(call)] {
            auto self = channel.lock();
            auto call = weak.lock();
            if (self && call) self->Cancel(call);
          });
      if (!registered) {
        Finish(call.get(), errors::Cancelled("The step was cancelled."));
        return;
      }
    }
    bool cancelled;
    {
      mutex_lock lock(mu_);
      cancelled = call->cancelled;
      if (!cancelled) queue_.push_back(call);
    }
    if (cancelled) {
      Finish(call.get(), errors::Cancelled("The step was cancelled."));
    } else {
      Pump();
    }
  }

  // Fails all calls, the ones to come included. The first reason counts.
  void Break(absl::Status status) {
    std::vector<std::shared_ptr<Call>> calls;
    {
      mutex_lock lock(mu_);
      if (broken_.ok()) broken_ = status;
      status = broken_;
      if (current_) calls.push_back(std::move(current_));
      for (auto& call : queue_) calls.push_back(std::move(call));
      queue_.clear();
    }
    for (auto& call : calls) Complete(call.get(), status);
  }

  // Returns the number of the call that the process has not answered; or 0.
  int64_t UnderWay() {
    mutex_lock lock(mu_);
    return busy_ ? number_ : 0;
  }

  // Makes a time-out the reason of the process's death, which is to follow; if
  // that was asked before, no longer waits for it. Returns whether the call is
  // still under way.
  bool TimeOut(int64_t number, double seconds) {
    absl::Status status;
    {
      mutex_lock lock(mu_);
      if (!busy_ || number_ != number) return false;
      status = broken_;
      if (status.ok()) {
        broken_ = errors::DeadlineExceeded(
            "An environment process took more than ", seconds, " seconds for ",
            current_ ? *current_->method : "a cancelled call",
            "; it was killed.");
      }
    }
    if (!status.ok()) Break(status);
    return true;
  }

  // The process rang, or its end of the socket closed.
  void OnReadable() {
    Bell bell;
    bool complete;
    std::shared_ptr<Call> call;
    {
      mutex_lock lock(mu_);
      // The answer to a call from Python, which waits for it; or the end of an
      // idle process, which the next call will notice.
      if (!busy_) return;
      ssize_t received;
      do {
        received = recv(socket_, &bell, sizeof(bell), MSG_DONTWAIT);
      } while (received < 0 && errno == EINTR);
      if (received < 0 && errno == EAGAIN) return;  // Python had it.
      complete = received == sizeof(bell) && bell.header_size >= 0 &&
                 bell.header_size <= bell.size;
      if (complete) call = std::move(current_);
    }
    if (!complete) {
      Break(errors::Internal("The environment process died."));
      return;
    }
    // An abandoned call has left no `current_`; its answer is dropped.
    if (call) {
      absl::Status status = memory_.Reserve(bell.size);
      if (status.ok()) status = ReadResult(*call, memory_.data(), bell);
      Complete(call.get(), status);
    }
    {
      mutex_lock lock(mu_);
      busy_ = false;
    }
    Pump();
  }

 private:
  // Sends the next call if the process is idle.
  void Pump() {
    std::shared_ptr<Call> unsent;
    absl::Status status;
    {
      mutex_lock lock(mu_);
      status = broken_;
      if (status.ok()) {
        if (busy_ || queue_.empty()) return;
        auto call = std::move(queue_.front());
        queue_.pop_front();
        // Written under the lock, so that a cancellation can't free the call's
        // arguments meanwhile; nobody else waits for this lock for long.
        Bell bell;
        status = Write(*call, &bell);
        if (status.ok()) {
          busy_ = true;
          static std::atomic<int64_t> calls{0};
          number_ = ++calls;
          current_ = std::move(call);
          if (Ring(bell)) return;
          status = errors::Internal("The environment process died.");
        } else {
          unsent = std::move(call);
        }
      }
    }
    if (unsent) {  // Not the fault of the others.
      Complete(unsent.get(), status);
      Pump();
    } else {
      Break(status);
    }
  }

  absl::Status Write(const Call& call, Bell* bell)
      TF_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    Writer writer;
    WriteRequest(call, &writer);
    *bell = writer.bell();
    TF_RETURN_IF_ERROR(memory_.Reserve(bell->size));
    writer.Write(memory_.data());
    return absl::OkStatus();
  }

  // Returns whether the process is there to answer.
  bool Ring(const Bell& bell) TF_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ssize_t sent;
    do {
      sent = send(socket_, &bell, sizeof(bell), MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    return sent == sizeof(bell);
  }

  void Cancel(const std::shared_ptr<Call>& call) {
    {
      mutex_lock lock(mu_);
      if (current_ == call) {
        current_.reset();
      } else {
        const auto it = std::find(queue_.begin(), queue_.end(), call);
        if (it == queue_.end()) {  // Not yet queued, or completing elsewhere.
          call->cancelled = true;
          return;
        }
        queue_.erase(it);
      }
    }
    Finish(call.get(), errors::Cancelled("The step was cancelled."));
  }

  static void Complete(Call* call, const absl::Status& status) {
    if (call->token != CancellationManager::kInvalidToken) {
      // A Cancel that runs already finds nothing to do: no need to wait for it.
      call->context->cancellation_manager()->TryDeregisterCallback(call->token);
    }
    Finish(call, status);
  }

  const int socket_;
  int64_t key_ = 0;
  // Written under `mu_` while the process is idle, read by the poller while it
  // is busy: never both.
  SharedMemory memory_;
  mutex mu_;
  bool busy_ TF_GUARDED_BY(mu_) = false;
  int64_t number_ TF_GUARDED_BY(mu_) =
      0;  // Of the last call; no two are equal.
  absl::Status broken_ TF_GUARDED_BY(mu_);
  std::shared_ptr<Call> current_ TF_GUARDED_BY(mu_);
  std::deque<std::shared_ptr<Call>> queue_ TF_GUARDED_BY(mu_);
};

void Poller::Loop(int epoll) {
  constexpr int kMaxEvents = 64;
  epoll_event events[kMaxEvents];
  while (true) {
    const int count = epoll_wait(epoll, events, kMaxEvents, -1);
    for (int i = 0; i < count; ++i) {
      if (auto channel = Find(events[i].data.u64)) channel->OnReadable();
    }
  }
}

// The open channels by the process numbers that graphs refer to.
class Channels {
 public:
  static Channels* Get() {
    static Channels* channels = new Channels;
    return channels;
  }

  // Returns 0 or an error number.
  int Open(int64_t process, std::shared_ptr<Channel> channel) {
    const int error = channel->Start();
    if (error == 0) Replace(process, std::move(channel));
    return error;
  }

  void Close(int64_t process) { Replace(process, nullptr); }

  std::shared_ptr<Channel> Find(int64_t process) {
    mutex_lock lock(mu_);
    const auto it = channels_.find(process);
    return it == channels_.end() ? nullptr : it->second;
  }

 private:
  void Replace(int64_t process, std::shared_ptr<Channel> channel) {
    {
      mutex_lock lock(mu_);
      std::swap(channels_[process], channel);
      if (channels_[process] == nullptr) channels_.erase(process);
    }
    if (channel) {
      channel->Break(errors::Cancelled("The environment process was closed."));
    }
  }

  mutex mu_;
  std::unordered_map<int64_t, std::shared_ptr<Channel>> channels_
      TF_GUARDED_BY(mu_);
};

class PyProcessCallOp : public AsyncOpKernel {
 public:
  explicit PyProcessCallOp(OpKernelConstruction* context)
      : AsyncOpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("method", &method_));
    OP_REQUIRES_OK(context, context->GetAttr("Tout", &types_));
    OP_REQUIRES_OK(context, context->GetAttr("output_shapes", &shapes_));
    OP_REQUIRES(
        context, types_.size() == shapes_.size(),
        errors::InvalidArgument("Tout and output_shapes differ in "
                                "length: ",
                                types_.size(), " and ", shapes_.size()));
  }

  // Neither waits nor computes: not worth a thread of its own.
  bool IsExpensive() override { return false; }

  void ComputeAsync(OpKernelContext* context, DoneCallback done) override {
    const Tensor& process = context->input(0);
    OP_REQUIRES_ASYNC(context,
                      tensorflow::TensorShapeUtils::IsScalar(process.shape()),
                      errors::InvalidArgument("process must be a scalar, is ",
                                              process.shape().DebugString()),
                      done);
    auto channel = Channels::Get()->Find(process.scalar<int64_t>()());
    OP_REQUIRES_ASYNC(context, channel != nullptr,
                      errors::FailedPrecondition(
                          "Environment process ", process.scalar<int64_t>()(),
                          " is not running; start it first."),
                      done);
    channel->Enqueue(std::make_shared<Call>(
        Call{context, std::move(done), &method_, &shapes_, &types_}));
  }

 private:
  std::string method_;
  std::vector<PartialTensorShape> shapes_;
  std::vector<DataType> types_;
};

REGISTER_OP("PyProcessCall")
    .Input("process: int64")
    .Input("arguments: Tin")
    .Output("results: Tout")
    .Attr("method: string")
    .Attr("Tin: list(type) >= 0")
    .Attr("Tout: list(type) >= 0")
    .Attr("output_shapes: list(shape) >= 0")
    .SetIsStateful()
    .SetShapeFn([](tensorflow::shape_inference::InferenceContext* context) {
      std::vector<PartialTensorShape> shapes;
      TF_RETURN_IF_ERROR(context->GetAttr("output_shapes", &shapes));
      if (static_cast<int>(shapes.size()) != context->num_outputs()) {
        return errors::InvalidArgument(
            "Tout and output_shapes differ in "
            "length.");
      }
      for (int i = 0; i < context->num_outputs(); ++i) {
        tensorflow::shape_inference::ShapeHandle shape;
        TF_RETURN_IF_ERROR(
            context->MakeShapeFromPartialTensorShape(shapes[i], &shape));
        context->set_output(i, shape);
      }
      return absl::OkStatus();
    })
    .Doc(R"doc(
Calls a method of the object that lives in an environment process.

process: number of the process, as given by PyProcess.
arguments: the method's arguments.
results: the flattened result of the method.
method: name of the method.
output_shapes: promised shapes of the results; the call fails on others.
)doc");

REGISTER_KERNEL_BUILDER(Name("PyProcessCall").Device(tensorflow::DEVICE_CPU),
                        PyProcessCallOp);

}  // namespace
}  // namespace impala

extern "C" {

// Opens the channel of a process, replacing the one it had. Duplicates both
// file descriptors. Returns 0 or an error number.
int ImpalaOpenChannel(int64_t process, int socket, int memory) {
  const int own_socket = fcntl(socket, F_DUPFD_CLOEXEC, 0);
  if (own_socket < 0) return errno;
  const int own_memory = fcntl(memory, F_DUPFD_CLOEXEC, 0);
  if (own_memory < 0) {
    const int error = errno;
    close(own_socket);
    return error;
  }
  return impala::Channels::Get()->Open(
      process, std::make_shared<impala::Channel>(own_socket, own_memory));
}

// Closes the channel of a process; its calls end with Cancelled.
void ImpalaCloseChannel(int64_t process) {
  impala::Channels::Get()->Close(process);
}

// Returns the number of the call that a process has not answered; 0 if none.
int64_t ImpalaCallUnderWay(int64_t process) {
  auto channel = impala::Channels::Get()->Find(process);
  return channel == nullptr ? 0 : channel->UnderWay();
}

// Has a call that is still under way, and the ones that wait for it, end with
// DeadlineExceeded: when the process dies, or when this is called again.
// Returns whether the call is still under way.
bool ImpalaTimeOut(int64_t process, int64_t call, double seconds) {
  auto channel = impala::Channels::Get()->Find(process);
  return channel != nullptr && channel->TimeOut(call, seconds);
}

}  // extern "C"
