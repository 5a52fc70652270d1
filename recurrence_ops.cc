// Licensed under the Apache License, Version 2.0; see LICENSE.
//
// The recurrence of an LSTM over a sequence, and its gradient, as one
// TensorFlow op each for processors with AVX2.
//
// The products with the inputs are made before, for all steps at once. A step
// is what remains: the product of the hidden state and the recurrent weights,
// and the gates. With TensorFlow's ops it is some 30 of them, of which most
// take longer to start than to compute.
//
// Rows of a batch don't depend on each other. So they are divided among
// TensorFlow's threads, each of which computes all steps of its rows.
//
// A sum of products is always added up in the order of the weights' rows, one
// after another. So a row's result doesn't depend on how many others there are,
// nor on the threads.
//
// A vector holds 8 neighbouring columns. For sequences, the weights are first
// packed in panels of 16 columns, each of which is read from its beginning to
// its end.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/util/work_sharder.h"

namespace impala {
namespace {

constexpr int kLanes = 8;
constexpr int kPanel = 2 * kLanes;  // Columns.
constexpr int kPanels = 4;          // Of a row that is alone, at once.
constexpr int kRows = 4;            // At once.
constexpr int kGates = 4;           // Input, forget, cell and output gate.
// Another thread is woken for so many cycles of work at least.
constexpr int64_t kCyclesPerThread = 500'000;

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Integers __attribute__((vector_size(4 * kLanes)));
// The same somewhere in memory.
typedef float Unaligned
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// A matrix that rows are multiplied by.
struct Matrix {
  const float* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t panel_stride;
};

// The only functions with such instructions: no code that runs while the
// library is loaded may have them.
#if !defined(__x86_64__)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

inline Vector Load(const float* place) {
  return *reinterpret_cast<const Unaligned*>(place);
}

inline void Store(float* place, Vector value) {
  *reinterpret_cast<Unaligned*>(place) = value;
}

// Returns exp(x) - 1, exact to a few units of the last place also near zero. So
// that the result is finite, x is limited to [-87, 87]; but NaN stays.
inline Vector ExpMinusOne(Vector x) {
  const Vector limit = Vector{} + 87.0f;
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  // exp(x) = 2^n * exp(r) with |r| <= log(2) / 2. Adding the large number
  // rounds to integers, which are then its lowest bits.
  constexpr float kRound = 0x1.8p23f;
  const Vector rounded = x * 0x1.715476p0f + kRound;
  const Vector n = rounded - kRound;
  const Integers bits = reinterpret_cast<Integers>(rounded);
  const Vector power = reinterpret_cast<Vector>((bits << 23) + (127u << 23));
  // log(2) in two parts: n times the first is exact.
  const Vector r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  // exp(r) - 1 = r + r^2 * p(r), where p has the least largest error.
  Vector p = Vector{} + 0x1.a1a93p-13f;
  p = p * r + 0x1.6d7b7cp-10f;
  p = p * r + 0x1.11108ap-7f;
  p = p * r + 0x1.5554a8p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  return power * (p * r * r + r) + (power - 1.0f);
}

inline Vector Sigmoid(Vector x) { return 1.0f / (ExpMinusOne(-x) + 2.0f); }

inline Vector Tanh(Vector x) {
  const Vector e = ExpMinusOne(x + x);
  return e / (e + 2.0f);
}

// Adds to `sums`, [kCount, columns], the products of `factors`, [kCount, rows],
// and a few panels of a matrix.
template <int kCount, int kWidth>
inline void AddPanels(const float* factors, const Matrix& matrix, int64_t panel,
                      float* sums) {
  Vector total[kCount][2 * kWidth];
  const auto sum = [&](int row, int v) {
    return sums + row * matrix.columns + panel * kPanel + v * kLanes;
  };
  for (int row = 0; row < kCount; ++row) {
    for (int v = 0; v < 2 * kWidth; ++v) total[row][v] = Load(sum(row, v));
  }
  const float* place = matrix.data + panel * matrix.panel_stride;
  for (int64_t k = 0; k < matrix.rows; ++k, place += matrix.row_stride) {
    Vector weights[2 * kWidth];
    for (int v = 0; v < 2 * kWidth; ++v) {
      weights[v] = Load(place + v / 2 * matrix.panel_stride + v % 2 * kLanes);
    }
    for (int row = 0; row < kCount; ++row) {
      const float factor = factors[row * matrix.rows + k];
      for (int v = 0; v < 2 * kWidth; ++v) total[row][v] += factor * weights[v];
    }
  }
  for (int row = 0; row < kCount; ++row) {
    for (int v = 0; v < 2 * kWidth; ++v) Store(sum(row, v), total[row][v]);
  }
}

// The same for any number of rows and all columns.
void AddProducts(int64_t count, const float* factors, const Matrix& matrix,
                 float* sums) {
  const int64_t rest = count % kRows;
  const float* last_factors = factors + (count - rest) * matrix.rows;
  float* last_sums = sums + (count - rest) * matrix.columns;
  for (int64_t panel = 0; panel < matrix.columns / kPanel; panel += kPanels) {
    for (int64_t p = panel; p < panel + kPanels; ++p) {
      for (int64_t row = 0; row < count - rest; row += kRows) {
        AddPanels<kRows, 1>(factors + row * matrix.rows, matrix, p,
                            sums + row * matrix.columns);
      }
      if (rest == 3) AddPanels<3, 1>(last_factors, matrix, p, last_sums);
      if (rest == 2 && p % 2 == 0) {
        AddPanels<2, 2>(last_factors, matrix, p, last_sums);
      }
    }
    if (rest == 1)
      AddPanels<1, kPanels>(last_factors, matrix, panel, last_sums);
  }
}

// Copies a panel of a matrix, of stride `columns`, to [rows, kPanel].
void Pack(const float* matrix, int64_t rows, int64_t columns, int64_t panel,
          float* packed) {
  for (int64_t k = 0; k < rows; ++k) {
    const float* from = matrix + k * columns + panel * kPanel;
    for (int i = 0; i < kPanel; i += kLanes) {
      Store(packed + k * kPanel + i, Load(from + i));
    }
  }
}

// The same for a matrix, [columns, rows], that is transposed on the way.
void PackTransposed(const float* matrix, int64_t rows, int64_t panel,
                    float* packed) {
  // Square by square, so that what is read and written stays in the cache.
  for (int64_t k = 0; k < rows; k += kPanel) {
    for (int column = 0; column < kPanel; ++column) {
      const float* from = matrix + (panel * kPanel + column) * rows + k;
      for (int i = 0; i < kPanel; ++i) {
        packed[(k + i) * kPanel + column] = from[i];
      }
    }
  }
}

// Computes the state of a row after a step, and replaces the sums in `gates`,
// [4 * units], by the activated gates. `cell_before` is null for zeros.
void Activate(int64_t units, const float* cell_before, float* gates,
              float* hidden, float* cell) {
  for (int64_t u = 0; u < units; u += kLanes) {
    float* place = gates + u;
    const Vector input = Sigmoid(Load(place));
    const Vector forget = Sigmoid(Load(place + units));
    const Vector candidate = Tanh(Load(place + 2 * units));
    const Vector output = Sigmoid(Load(place + 3 * units));
    const Vector before =
        cell_before == nullptr ? Vector{} : Load(cell_before + u);
    const Vector after = forget * before + input * candidate;
    Store(place, input);
    Store(place + units, forget);
    Store(place + 2 * units, candidate);
    Store(place + 3 * units, output);
    Store(cell + u, after);
    Store(hidden + u, output * Tanh(after));
  }
}

// The gradient of `Activate`. In: the gradient of the row's state, in two parts
// that are added. Out: those of the sums, and of the cell before.
void ActivateGradient(int64_t units, const float* cell_before,
                      const float* gates, const float* cell,
                      const float* hidden_gradient, const float* cell_gradient,
                      const float* later_hidden_gradient, float* gates_gradient,
                      float* later_cell_gradient) {
  for (int64_t u = 0; u < units; u += kLanes) {
    const Vector input = Load(gates + u);
    const Vector forget = Load(gates + u + units);
    const Vector candidate = Load(gates + u + 2 * units);
    const Vector output = Load(gates + u + 3 * units);
    const Vector before =
        cell_before == nullptr ? Vector{} : Load(cell_before + u);
    const Vector squashed = Tanh(Load(cell + u));
    const Vector of_hidden =
        Load(hidden_gradient + u) + Load(later_hidden_gradient + u);
    const Vector of_cell = Load(cell_gradient + u) +
                           Load(later_cell_gradient + u) +
                           of_hidden * output * (1.0f - squashed * squashed);
    float* place = gates_gradient + u;
    Store(place, of_cell * candidate * input * (1.0f - input));
    Store(place + units, of_cell * before * forget * (1.0f - forget));
    Store(place + 2 * units, of_cell * input * (1.0f - candidate * candidate));
    Store(place + 3 * units, of_hidden * squashed * output * (1.0f - output));
    Store(later_cell_gradient + u, of_cell * forget);
  }
}

#if !defined(__x86_64__)
#elif defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;
namespace errors = tensorflow::errors;

bool Supported() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;  // Vectors are made of those that the processor has.
#endif
}

float* Floats(Tensor* tensor) { return tensor->flat<float>().data(); }

const float* Floats(const Tensor& tensor) {
  return tensor.flat<float>().data();
}

// The sizes of a sequence, or of a single step.
struct Sizes {
  int64_t steps;
  int64_t batch;
  int64_t units;

  int64_t blocks() const { return (batch + kRows - 1) / kRows; }
  // About as many processor cycles as the steps of a block take.
  int64_t cycles() const { return steps * units * units; }
  // Of a row at a step, in [T, B, width].
  int64_t place(int64_t step, int64_t row, int64_t width) const {
    return (step * batch + row) * width;
  }
};

absl::Status CheckShape(const Tensor& tensor, const TensorShape& shape) {
  if (tensor.shape() == shape) return absl::OkStatus();
  return errors::InvalidArgument("Expected ", shape.DebugString(), ", not ",
                                 tensor.shape().DebugString());
}

absl::Status GetSizes(const Tensor& done, const Tensor& cell,
                      const Tensor& weights, Sizes* sizes) {
  if (done.dims() != 1 && done.dims() != 2) {
    return errors::InvalidArgument("`done` is [T, B] or [B], not ",
                                   done.shape().DebugString());
  }
  *sizes = {done.dims() == 1 ? 1 : done.dim_size(0),
            done.dim_size(done.dims() - 1),
            weights.dims() == 2 ? weights.dim_size(0) : 0};
  if (sizes->units == 0 || sizes->units % (kPanels * kPanel) != 0) {
    return errors::InvalidArgument(
        "Weights are [units, 4 * units], where 64 divides the units, not ",
        weights.shape().DebugString());
  }
  TF_RETURN_IF_ERROR(
      CheckShape(weights, {sizes->units, kGates * sizes->units}));
  return CheckShape(cell, {sizes->batch, sizes->units});
}

// Returns [T, B, width] or [B, width].
TensorShape Sequence(const Tensor& done, int64_t width) {
  TensorShape shape = done.shape();
  shape.AddDim(width);
  return shape;
}

// Calls work(begin, end) for parts of 0 to `total`, in TensorFlow's threads.
template <typename Work>
void Divide(OpKernelContext* context, int64_t total, int64_t cycles,
            const Work& work) {
  const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
  const int64_t parts = std::clamp<int64_t>(total * cycles / kCyclesPerThread,
                                            1, threads.num_threads);
  tensorflow::Shard(parts, threads.workers, total, cycles, work);
}

// Calls work(begin, end) for parts of a batch's rows.
template <typename Work>
void DivideRows(OpKernelContext* context, const Sizes& sizes,
                const Work& work) {
  Divide(context, sizes.blocks(), sizes.cycles(),
         [&](int64_t begin, int64_t end) {
           work(begin * kRows, std::min(end * kRows, sizes.batch));
         });
}

class Kernel : public OpKernel {
 public:
  explicit Kernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES(context, Supported(),
                errors::Unimplemented("This processor has no AVX2."));
  }

 protected:
  // Calls pack(panel, place) for all panels of `matrix`, whose sizes are set,
  // and sets the rest of it. The tensor holds the memory.
  template <typename Function>
  static absl::Status PackAll(OpKernelContext* context, const Function& pack,
                              Matrix* matrix, Tensor* packed) {
    TF_RETURN_IF_ERROR(context->allocate_temp(
        tensorflow::DT_FLOAT, {matrix->rows, matrix->columns}, packed));
    matrix->row_stride = kPanel;
    matrix->panel_stride = matrix->rows * kPanel;
    matrix->data = Floats(*packed);
    Divide(context, matrix->columns / kPanel, matrix->panel_stride,
           [&](int64_t begin, int64_t end) {
             for (int64_t panel = begin; panel < end; ++panel) {
               pack(panel, Floats(packed) + panel * matrix->panel_stride);
             }
           });
    return absl::OkStatus();
  }
};

class LstmRecurrence : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& sums = context->input(0);
    const Tensor& done = context->input(1);
    const Tensor& first_hidden = context->input(2);
    const Tensor& first_cell = context->input(3);
    const Tensor& weights = context->input(4);
    Sizes sizes;
    OP_REQUIRES_OK(context, GetSizes(done, first_cell, weights, &sizes));
    const int64_t units = sizes.units, width = kGates * units;
    OP_REQUIRES_OK(context, CheckShape(sums, Sequence(done, width)));
    OP_REQUIRES_OK(context, CheckShape(first_hidden, first_cell.shape()));
    Tensor* outputs[4];
    for (int i = 0; i < 4; ++i) {
      OP_REQUIRES_OK(
          context, context->allocate_output(
                       i, Sequence(done, i < 3 ? units : width), &outputs[i]));
    }
    Matrix matrix = {Floats(weights), units, width, width, kPanel};
    Tensor packed;
    if (sizes.steps > 1) {
      const auto pack = [&](int64_t panel, float* place) {
        Pack(Floats(weights), units, width, panel, place);
      };
      OP_REQUIRES_OK(context, PackAll(context, pack, &matrix, &packed));
    }
    const bool* begins = done.flat<bool>().data();
    float *const hidden = Floats(outputs[0]), *const cell = Floats(outputs[1]),
                 *const before = Floats(outputs[2]),
                 *const gates = Floats(outputs[3]);
    DivideRows(context, sizes, [&](int64_t begin, int64_t end) {
      for (int64_t t = 0; t < sizes.steps; ++t) {
        const auto row_before = [&](const Tensor& first, const float* states,
                                    int64_t row) -> const float* {
          if (begins[sizes.place(t, row, 1)]) return nullptr;
          return t == 0 ? Floats(first) + row * units
                        : states + sizes.place(t - 1, row, units);
        };
        for (int64_t row = begin; row < end; ++row) {
          float* to = before + sizes.place(t, row, units);
          const float* from = row_before(first_hidden, hidden, row);
          if (from == nullptr) {
            memset(to, 0, units * sizeof(float));
          } else {
            memcpy(to, from, units * sizeof(float));
          }
        }
        const int64_t place = sizes.place(t, begin, width);
        memcpy(gates + place, Floats(sums) + place,
               (end - begin) * width * sizeof(float));
        AddProducts(end - begin, before + sizes.place(t, begin, units), matrix,
                    gates + place);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t state = sizes.place(t, row, units);
          Activate(units, row_before(first_cell, cell, row),
                   gates + kGates * state, hidden + state, cell + state);
        }
      }
    });
  }
};

class LstmRecurrenceGradient : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& hidden_gradient = context->input(0);
    const Tensor& cell_gradient = context->input(1);
    const Tensor& done = context->input(2);
    const Tensor& first_cell = context->input(3);
    const Tensor& weights = context->input(4);
    const Tensor& cell = context->input(5);
    const Tensor& gates = context->input(6);
    Sizes sizes;
    OP_REQUIRES_OK(context, GetSizes(done, first_cell, weights, &sizes));
    const int64_t units = sizes.units, width = kGates * units;
    for (const Tensor* tensor : {&hidden_gradient, &cell_gradient, &cell}) {
      OP_REQUIRES_OK(context, CheckShape(*tensor, Sequence(done, units)));
    }
    OP_REQUIRES_OK(context, CheckShape(gates, Sequence(done, width)));
    Tensor* outputs[3];
    for (int i = 0; i < 3; ++i) {
      OP_REQUIRES_OK(
          context,
          context->allocate_output(
              i, i == 0 ? gates.shape() : first_cell.shape(), &outputs[i]));
    }
    Matrix matrix = {nullptr, width, units, 0, 0};
    Tensor packed;
    const auto pack = [&](int64_t panel, float* place) {
      PackTransposed(Floats(weights), width, panel, place);
    };
    OP_REQUIRES_OK(context, PackAll(context, pack, &matrix, &packed));
    const bool* begins = done.flat<bool>().data();
    float* const gates_gradient = Floats(outputs[0]);
    // What the gradient of a step adds to that of the state before. At the end,
    // the initial state's.
    float *const later_hidden = Floats(outputs[1]), *const later_cell =
                                                        Floats(outputs[2]);
    DivideRows(context, sizes, [&](int64_t begin, int64_t end) {
      const int64_t bytes = (end - begin) * units * sizeof(float);
      memset(later_hidden + begin * units, 0, bytes);
      memset(later_cell + begin * units, 0, bytes);
      for (int64_t t = sizes.steps - 1; t >= 0; --t) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t state = sizes.place(t, row, units);
          const float* before =
              t == 0 ? Floats(first_cell) + row * units
                     : Floats(cell) + sizes.place(t - 1, row, units);
          ActivateGradient(
              units, begins[sizes.place(t, row, 1)] ? nullptr : before,
              Floats(gates) + kGates * state, Floats(cell) + state,
              Floats(hidden_gradient) + state, Floats(cell_gradient) + state,
              later_hidden + row * units, gates_gradient + kGates * state,
              later_cell + row * units);
        }
        memset(later_hidden + begin * units, 0, bytes);
        AddProducts(end - begin, gates_gradient + sizes.place(t, begin, width),
                    matrix, later_hidden + begin * units);
        for (int64_t row = begin; row < end; ++row) {
          if (!begins[sizes.place(t, row, 1)]) continue;
          memset(later_hidden + row * units, 0, units * sizeof(float));
          memset(later_cell + row * units, 0, units * sizeof(float));
        }
      }
    });
  }
};

// [..., width], of the sequence that `done` is of.
absl::Status SequenceShape(InferenceContext* context, const ShapeHandle& done,
                           DimensionHandle width, ShapeHandle* shape) {
  return context->Concatenate(done, context->Vector(width), shape);
}

absl::Status RecurrenceShape(InferenceContext* context) {
  ShapeHandle done, weights, state, gates;
  TF_RETURN_IF_ERROR(context->WithRankAtLeast(context->input(1), 1, &done));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(4), 2, &weights));
  TF_RETURN_IF_ERROR(
      SequenceShape(context, done, context->Dim(weights, 0), &state));
  TF_RETURN_IF_ERROR(
      SequenceShape(context, done, context->Dim(weights, 1), &gates));
  for (int i = 0; i < 3; ++i) context->set_output(i, state);
  context->set_output(3, gates);
  return absl::OkStatus();
}

absl::Status RecurrenceGradientShape(InferenceContext* context) {
  context->set_output(0, context->input(6));
  context->set_output(1, context->input(3));
  context->set_output(2, context->input(3));
  return absl::OkStatus();
}

REGISTER_OP("LstmRecurrence")
    .Input("sums: float")
    .Input("done: bool")
    .Input("first_hidden: float")
    .Input("first_cell: float")
    .Input("weights: float")
    .Output("hidden: float")
    .Output("cell: float")
    .Output("hidden_before: float")
    .Output("gates: float")
    .SetShapeFn(RecurrenceShape)
    .Doc(R"doc(
Runs an LSTM over a sequence, [T, B, ...], or makes one step, [B, ...].

sums: products of the inputs, and biases, [..., 4 * units], of the input gate, the
  forget gate, the cell and the output gate.
done: whether a sequence begins, for which the state before is zero.
first_hidden: state before the first step, [B, units].
first_cell: the same.
weights: recurrent, [units, 4 * units].
hidden: state after each step, [..., units].
cell: the same.
hidden_before: state before each step, zero where a sequence begins.
gates: activated, [..., 4 * units].
)doc");

REGISTER_OP("LstmRecurrenceGradient")
    .Input("hidden_gradient: float")
    .Input("cell_gradient: float")
    .Input("done: bool")
    .Input("first_cell: float")
    .Input("weights: float")
    .Input("cell: float")
    .Input("gates: float")
    .Output("sums_gradient: float")
    .Output("first_hidden_gradient: float")
    .Output("first_cell_gradient: float")
    .SetShapeFn(RecurrenceGradientShape)
    .Doc(R"doc(
The gradients of `LstmRecurrence`, given those of `hidden` and `cell`. That of
the weights is the product of `hidden_before` and `sums_gradient`.
)doc");

REGISTER_KERNEL_BUILDER(Name("LstmRecurrence").Device(tensorflow::DEVICE_CPU),
                        LstmRecurrence);
REGISTER_KERNEL_BUILDER(
    Name("LstmRecurrenceGradient").Device(tensorflow::DEVICE_CPU),
    LstmRecurrenceGradient);

}  // namespace
}  // namespace impala

extern "C" bool ImpalaRecurrenceSupported() { return impala::Supported(); }
