// Licensed under the Apache License, Version 2.0; see LICENSE.
//
// The environment process's end of a line, as a Python module with one
// function: `answer_calls` does what `_answer_calls` in `py_process.py` does.
//
// Environment processes outnumber the cores, and each finds the caches filled
// by the others: what it executes and touches for a call costs several times
// what a lone process would see. But most calls are like one before in all but
// their data: method, dtypes and shapes are the same. So what is where in the
// messages is remembered, and all between the rings, but the method, is done
// here. The channel, in Python, works out what is where in the first of such
// calls, and sends results that are unlike those before.
//
// TensorFlow isn't used: it would cost each process seconds and hundreds of MB.

#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <Python.h>  // Wants to be the first.
#include <errno.h>
#include <numpy/arrayobject.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cmath>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr size_t kBellSize = 2 * sizeof(int64_t);
constexpr size_t kMaxCalls = 8;  // That are remembered.

struct Release {
  template <typename T>
  void operator()(T* object) const {
    Py_DECREF(object);
  }
};

// An owned reference to a Python object.
template <typename T = PyObject>
using Ref = std::unique_ptr<T, Release>;

// Where a string, or the numbers of an array, are in a message.
struct Piece {
  Py_ssize_t begin;
  Py_ssize_t size;
};

// An array of a message.
struct Slot {
  Ref<PyArray_Descr> dtype;
  std::vector<npy_intp> shape;
  std::vector<Piece> pieces;

  bool is_string() const { return dtype->type_num == NPY_OBJECT; }
};

// What is where in a message, from a `py_process._Layout`.
struct Layout {
  std::string bell;
  std::string header;
  std::vector<Slot> slots;
};

// How to answer calls that are like one before.
struct Call {
  Ref<> method;
  Ref<> dtypes;
  Layout request;
  std::optional<Layout> last_answer;
};

// --- Results ----------------------------------------------------------------

// These functions return whether a value is in its place now. It isn't if it
// has another dtype, shape or length than the one the layout was made for, or
// is of a type that isn't known here. No Python exception is left.

bool WriteBytes(const char* bytes, Py_ssize_t size, const Piece& piece,
                char* memory) {
  if (size != piece.size) return false;
  memcpy(memory + piece.begin, bytes, size);
  return true;
}

bool WriteString(PyObject* value, const Piece& piece, char* memory) {
  if (PyBytes_CheckExact(value)) {
    return WriteBytes(PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value), piece,
                      memory);
  }
  if (!PyUnicode_CheckExact(value)) return false;
  Py_ssize_t size;
  const char* bytes = PyUnicode_AsUTF8AndSize(value, &size);
  if (bytes == nullptr) {  // It has no encoding.
    PyErr_Clear();
    return false;
  }
  return WriteBytes(bytes, size, piece, memory);
}

bool WriteArray(PyArrayObject* value, const Slot& slot, char* memory) {
  const int rank = slot.shape.size();
  if (PyArray_TYPE(value) != slot.dtype->type_num ||
      !PyArray_ISNOTSWAPPED(value) || PyArray_NDIM(value) != rank ||
      !PyArray_CompareLists(PyArray_DIMS(value), slot.shape.data(), rank)) {
    return false;
  }
  Ref<PyArrayObject> contiguous(  // Some frames are slices of others.
      reinterpret_cast<PyArrayObject*>(
          PyArray_FromArray(value, nullptr, NPY_ARRAY_C_CONTIGUOUS)));
  if (contiguous == nullptr) {
    PyErr_Clear();
    return false;
  }
  const Piece& piece = slot.pieces[0];
  memcpy(memory + piece.begin, PyArray_DATA(contiguous.get()), piece.size);
  return true;
}

template <typename T>
bool WriteInteger(PyObject* value, char* place) {
  int overflow;
  const long long wide = PyLong_AsLongLongAndOverflow(value, &overflow);
  const T number = static_cast<T>(wide);
  if (overflow != 0 || number != wide) return false;
  memcpy(place, &number, sizeof(number));
  return true;
}

template <typename T>
bool WriteFloat(PyObject* value, char* place) {
  const double wide = PyFloat_AsDouble(value);
  if (wide == -1 && PyErr_Occurred()) {  // The integer is too large.
    PyErr_Clear();
    return false;
  }
  const T number = static_cast<T>(wide);
  if (std::isinf(number) && !std::isinf(wide)) return false;
  memcpy(place, &number, sizeof(number));
  return true;
}

// Writes a number of Python's, in the dtype that was promised.
bool WriteNumber(PyObject* value, int type, char* place) {
  const bool is_integer = PyLong_CheckExact(value) || PyBool_Check(value);
  if (is_integer || PyFloat_CheckExact(value) ||
      PyArray_IsScalar(value, Double)) {
    if (type == NPY_FLOAT32) return WriteFloat<float>(value, place);
    if (type == NPY_FLOAT64) return WriteFloat<double>(value, place);
  }
  if (is_integer) {
    if (type == NPY_INT32) return WriteInteger<int32_t>(value, place);
    if (type == NPY_INT64) return WriteInteger<int64_t>(value, place);
    if (type == NPY_UINT8) return WriteInteger<uint8_t>(value, place);
  }
  if (PyBool_Check(value) && type == NPY_BOOL) {
    *place = value == Py_True;
    return true;
  }
  return false;
}

bool WriteLeaf(PyObject* value, const Slot& slot, char* memory) {
  if (PyArray_Check(value)) {
    return !slot.is_string() &&
           WriteArray(reinterpret_cast<PyArrayObject*>(value), slot, memory);
  }
  if (!slot.shape.empty()) return false;
  const Piece& piece = slot.pieces[0];
  if (slot.is_string()) return WriteString(value, piece, memory);
  char* place = memory + piece.begin;
  if (Py_TYPE(value) == slot.dtype->typeobj) {
    PyArray_ScalarAsCtype(value, place);
    return true;
  }
  return WriteNumber(value, slot.dtype->type_num, place);
}

// Takes a slot for each leaf of a nest of tuples, from `*slot` on.
bool WriteNest(PyObject* nest, const std::vector<Slot>& slots, size_t* slot,
               char* memory) {
  if (!PyTuple_CheckExact(nest)) {
    return *slot < slots.size() && WriteLeaf(nest, slots[(*slot)++], memory);
  }
  if (Py_EnterRecursiveCall(" in a result") != 0) {
    PyErr_Clear();
    return false;
  }
  bool written = true;
  for (Py_ssize_t i = 0; written && i < PyTuple_GET_SIZE(nest); ++i) {
    written = WriteNest(PyTuple_GET_ITEM(nest, i), slots, slot, memory);
  }
  Py_LeaveRecursiveCall();
  return written;
}

bool WriteAnswer(PyObject* result, const Layout& layout, char* memory) {
  memcpy(memory, layout.header.data(), layout.header.size());
  if (result == Py_None) return layout.slots.empty();
  size_t slot = 0;
  return WriteNest(result, layout.slots, &slot, memory) &&
         slot == layout.slots.size();
}

// --- Arguments --------------------------------------------------------------

// From here on, what returns null or false has set a Python exception.

Ref<> ReadString(const Piece& piece, const char* memory) {
  return Ref<>(PyBytes_FromStringAndSize(memory + piece.begin, piece.size));
}

Ref<> ReadArray(const Slot& slot, char* memory) {
  if (slot.shape.empty()) {
    if (slot.is_string()) return ReadString(slot.pieces[0], memory);
    return Ref<>(PyArray_Scalar(memory + slot.pieces[0].begin, slot.dtype.get(),
                                nullptr));
  }
  Ref<> array(PyArray_SimpleNew(slot.shape.size(),
                                const_cast<npy_intp*>(slot.shape.data()),
                                slot.dtype->type_num));
  if (array == nullptr) return nullptr;
  void* data = PyArray_DATA(reinterpret_cast<PyArrayObject*>(array.get()));
  if (!slot.is_string()) {
    memcpy(data, memory + slot.pieces[0].begin, slot.pieces[0].size);
    return array;
  }
  PyObject** strings = static_cast<PyObject**>(data);
  for (const Piece& piece : slot.pieces) {
    Ref<> string = ReadString(piece, memory);
    if (string == nullptr) return nullptr;
    Py_XSETREF(*strings, string.release());
    ++strings;
  }
  return array;
}

// --- Layouts ----------------------------------------------------------------

bool ReadSlot(PyObject* array, Slot* slot) {
  PyArray_Descr* dtype;
  PyObject *shape, *slices;
  if (!PyArg_ParseTuple(array, "O!O!O!", &PyArrayDescr_Type, &dtype,
                        &PyTuple_Type, &shape, &PyList_Type, &slices)) {
    return false;
  }
  Py_INCREF(dtype);
  slot->dtype.reset(dtype);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    slot->shape.push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(shape, i)));
    if (PyErr_Occurred()) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(slices); ++i) {
    Py_ssize_t begin, end, step;
    if (PySlice_Unpack(PyList_GET_ITEM(slices, i), &begin, &end, &step) != 0) {
      return false;
    }
    slot->pieces.push_back({begin, end - begin});
  }
  return true;
}

bool ReadLayout(PyObject* from, Layout* layout) {
  Ref<> bell(PyObject_GetAttrString(from, "bell"));
  Ref<> header(PyObject_GetAttrString(from, "header"));
  Ref<> arrays(PyObject_GetAttrString(from, "arrays"));
  if (!bell || !header || !arrays) return false;
  layout->bell.assign(PyBytes_AS_STRING(bell.get()),
                      PyBytes_GET_SIZE(bell.get()));
  layout->header.assign(PyBytes_AS_STRING(header.get()),
                        PyBytes_GET_SIZE(header.get()));
  layout->slots.resize(PyTuple_GET_SIZE(arrays.get()));
  for (size_t i = 0; i < layout->slots.size(); ++i) {
    if (!ReadSlot(PyTuple_GET_ITEM(arrays.get(), i), &layout->slots[i])) {
      return false;
    }
  }
  return true;
}

// --- Serving ----------------------------------------------------------------

class Server {
 public:
  Server(PyObject* channel, PyObject* target, int socket_fd, int memory_fd)
      : channel_(channel),
        target_(target),
        socket_fd_(socket_fd),
        memory_fd_(memory_fd) {}

  ~Server() { Unmap(); }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Returns true when the program has hung up.
  bool Run() {
    std::string bell;
    while (true) {
      if (!Receive(&bell)) return false;
      if (bell.empty()) return true;
      if (!Handle(bell) && !SendError()) return false;
    }
  }

 private:
  // Waits for a bell; it is empty at the end of the line.
  bool Receive(std::string* bell) {
    bell->resize(kBellSize);
    ssize_t size;
    do {
      // Python looks for signals while it interprets, which it doesn't here;
      // one that has come before the wait will not interrupt it.
      if (PyErr_CheckSignals() != 0) return false;
      Py_BEGIN_ALLOW_THREADS;
      size = recv(socket_fd_, bell->data(), kBellSize, 0);
      Py_END_ALLOW_THREADS;
    } while (size < 0 && errno == EINTR);
    if (size < 0) return SetErrno();
    bell->resize(size);
    return true;
  }

  bool Handle(const std::string& bell) {
    Call* call = Find(bell);
    if (call == nullptr) call = Learn(bell);
    if (call == nullptr) return false;
    const Ref<> result = Invoke(*call);
    return result != nullptr && Reply(result.get(), call);
  }

  // Sends the Python exception that is set, unless it shall end the process.
  bool SendError() {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return false;
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    const Ref<> owned[] = {Ref<>(type), Ref<>(error), Ref<>(trace)};
    if (trace != nullptr) PyException_SetTraceback(error, trace);
    return Ref<>(PyObject_CallMethod(channel_, "send_error", "O", error)) !=
           nullptr;
  }

  // Returns what is known of a call; if nothing is, null without an exception.
  Call* Find(const std::string& bell) {
    for (auto call = calls_.begin(); call != calls_.end(); ++call) {
      const std::string& header = call->request.header;
      if (call->request.bell == bell &&
          memcmp(header.data(), memory_, header.size()) == 0) {
        calls_.splice(calls_.begin(), calls_, call);
        return &*call;
      }
    }
    return nullptr;
  }

  Call* Learn(const std::string& bell) {
    const Ref<> layout(PyObject_CallMethod(channel_, "read_layout", "y#",
                                           bell.data(), bell.size()));
    if (layout == nullptr) return nullptr;
    Call call;
    call.method.reset(PyObject_GetAttrString(layout.get(), "string"));
    call.dtypes.reset(PyObject_GetAttrString(layout.get(), "dtypes"));
    if (call.method == nullptr || call.dtypes == nullptr ||
        !ReadLayout(layout.get(), &call.request) || !Map()) {
      return nullptr;
    }
    calls_.push_front(std::move(call));
    if (calls_.size() > kMaxCalls) calls_.pop_back();
    return &calls_.front();
  }

  Ref<> Invoke(const Call& call) {
    std::vector<Ref<>> owned;
    std::vector<PyObject*> arguments = {target_};
    for (const Slot& slot : call.request.slots) {
      owned.push_back(ReadArray(slot, memory_));
      if (owned.back() == nullptr) return nullptr;
      arguments.push_back(owned.back().get());
    }
    return Ref<>(PyObject_VectorcallMethod(call.method.get(), arguments.data(),
                                           arguments.size(), nullptr));
  }

  bool Reply(PyObject* result, Call* call) {
    if (call->last_answer && WriteAnswer(result, *call->last_answer, memory_)) {
      // That the program is gone shows when the next bell is received.
      send(socket_fd_, call->last_answer->bell.data(), kBellSize, MSG_NOSIGNAL);
      return true;
    }
    call->last_answer.reset();
    const Ref<> layout(PyObject_CallMethod(channel_, "answer", "OO", result,
                                           call->dtypes.get()));
    if (layout == nullptr) return false;
    // The answer is on its way: what fails now must not become another.
    if (layout.get() != Py_None &&
        !(ReadLayout(layout.get(), &call->last_answer.emplace()) && Map())) {
      PyErr_Clear();
      call->last_answer.reset();
    }
    return true;
  }

  // Maps the shared memory if it has grown, which it does in Python only.
  bool Map() {
    struct stat file;
    if (fstat(memory_fd_, &file) != 0) return SetErrno();
    const size_t size = file.st_size;
    if (size <= size_) return true;
    void* memory =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd_, 0);
    if (memory == MAP_FAILED) return SetErrno();
    Unmap();
    memory_ = static_cast<char*>(memory);
    size_ = size;
    return true;
  }

  void Unmap() {
    if (memory_ != nullptr) munmap(memory_, size_);
  }

  static bool SetErrno() {
    PyErr_SetFromErrno(PyExc_OSError);
    return false;
  }

  PyObject* const channel_;
  PyObject* const target_;
  const int socket_fd_;
  const int memory_fd_;
  char* memory_ = nullptr;
  size_t size_ = 0;
  std::list<Call> calls_;  // Those used last come first.
};

PyObject* AnswerCalls(PyObject*, PyObject* args) {
  PyObject *channel, *target;
  int socket_fd, memory_fd;
  if (!PyArg_ParseTuple(args, "OO", &channel, &target)) return nullptr;
  const Ref<> filenos(PyObject_CallMethod(channel, "filenos", nullptr));
  if (filenos == nullptr ||
      !PyArg_ParseTuple(filenos.get(), "ii", &socket_fd, &memory_fd) ||
      !Server(channel, target, socket_fd, memory_fd).Run()) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"answer_calls", AnswerCalls, METH_VARARGS,
     "answer_calls(channel, target)\n\n"
     "Has an object answer the calls that come through a channel."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "py_process_callee", nullptr, -1,
                      methods};

}  // namespace

PyMODINIT_FUNC PyInit_py_process_callee() {
  // The file's name doesn't tell for which Python it was built.
  const std::string version = std::to_string(PY_MAJOR_VERSION) + "." +
                              std::to_string(PY_MINOR_VERSION) + ".";
  if (std::string(Py_GetVersion()).rfind(version, 0) != 0) {
    PyErr_Format(PyExc_ImportError, "it was built for Python %sx",
                 version.c_str());
    return nullptr;
  }
  import_array();
  return PyModule_Create(&module);
}
