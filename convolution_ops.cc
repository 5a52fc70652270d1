// Licensed under the Apache License, Version 2.0; see LICENSE.
//
// Convolutions of 3x3 pixels with few channels, as TensorFlow ops for
// processors with AVX-512.
//
// They are Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): a tile of
// 4x4 outputs depends on 6x6 inputs, and with both transformed, 36 products per
// pair of channels give what takes 144 otherwise. With 16 or 32 channels all
// that belongs to a dozen tiles fits the processor's innermost caches, where
// oneDNN, which TensorFlow uses, would come back to memory between steps:
//
//   1. the filter, [3, 3, in, out], becomes [36, in, out], once per call;
//   2. a block of tiles becomes [36, tiles, in];
//   3. 36 products of matrices make it [36, tiles, out], in place;
//   4. these become 4x4 outputs each, to which the bias is added and so on.
//
// A vector holds 16 channels of one pixel. Blocks are divided among
// TensorFlow's threads.
//
// The gradient of the input is a convolution of the output's gradient. That of
// the filter transforms inputs and outputs' gradients, multiplies them and sums
// up the products, for chunks of tiles that don't depend on the number of
// threads; so neither does the result.

#include <algorithm>
#include <cstring>
#include <memory>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/util/work_sharder.h"

namespace impala {
namespace {

constexpr int kLanes = 16;
constexpr int kOutputs = 4;                          // Along a side of a tile.
constexpr int kInputs = 6;                           // The same.
constexpr int kProducts = kInputs * kInputs;         // Per tile and channels.
constexpr int kTiles = 12;                           // Of a block.
constexpr int kGradientTiles = 24;                   // The same, for filters.
constexpr int64_t kChunkTiles = 8 * kGradientTiles;  // Summed apart.
constexpr int64_t kStreamed = int64_t{4} << 20;      // Bytes; see `Store`.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
// The same somewhere in memory.
typedef float Unaligned
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// Pictures, [images, height, width, channels], in tiles.
struct Pictures {
  int64_t images;
  int64_t height;
  int64_t width;

  int64_t rows() const { return (height + kOutputs - 1) / kOutputs; }
  int64_t columns() const { return (width + kOutputs - 1) / kOutputs; }
  int64_t tiles() const { return images * rows() * columns(); }
};

// The place of a tile, which goes through pictures line by line.
class Tile {
 public:
  Tile(const Pictures& pictures, int64_t number)
      : pictures_(pictures),
        image_(number / (pictures.rows() * pictures.columns())),
        y_(kOutputs * (number / pictures.columns() % pictures.rows())),
        x_(kOutputs * (number % pictures.columns())) {}

  void Next() {
    x_ += kOutputs;
    if (x_ < pictures_.width) return;
    x_ = 0;
    y_ += kOutputs;
    if (y_ < pictures_.height) return;
    y_ = 0;
    ++image_;
  }

  int64_t y() const { return y_; }
  int64_t x() const { return x_; }
  // Of its outputs, those inside of the picture.
  int64_t height() const {
    return std::min<int64_t>(kOutputs, pictures_.height - y_);
  }
  int64_t width() const {
    return std::min<int64_t>(kOutputs, pictures_.width - x_);
  }
  // Of its first output among all pixels.
  int64_t pixel() const {
    return (image_ * pictures_.height + y_) * pictures_.width + x_;
  }

 private:
  const Pictures& pictures_;
  int64_t image_;
  int64_t y_;
  int64_t x_;
};

// What is done to the outputs of a convolution.
struct Epilogue {
  const float* bias;      // [channels], added; null for none.
  const float* mask;      // Where it isn't positive, the sum becomes zero.
  const float* residual;  // Added at the end.
};

// The only functions with instructions of AVX-512: no code that runs while the
// library is loaded may have them.
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

inline Vector Load(const float* place) {
  return *reinterpret_cast<const Unaligned*>(place);
}

// A large result has left the caches when it is read again. Written past them,
// it needn't be fetched before.
template <bool kStream>
inline void Store(float* place, Vector value) {
#ifdef __AVX512F__
  if (kStream) {
    __builtin_ia32_movntps512(place, value);
    return;
  }
#endif
  *reinterpret_cast<Unaligned*>(place) = value;
}

// Unlike the other way round, this keeps NaNs.
inline Vector Relu(Vector value) {
  const Vector zero = {};
  return zero > value ? zero : value;
}

// The transforms are matrices of the paper's section 4.2, for a column.
inline void TransformFilter(const Vector g[3], Vector u[kInputs]) {
  const Vector even = (g[0] + g[2]) * (-1.f / 6), odd = g[1] * (-1.f / 6);
  const Vector even2 = g[0] * (1.f / 24) + g[2] * (1.f / 6);
  const Vector odd2 = g[1] * (1.f / 12);
  u[0] = g[0] * (1.f / 4);
  u[1] = even + odd;
  u[2] = even - odd;
  u[3] = even2 + odd2;
  u[4] = even2 - odd2;
  u[5] = g[2];
}

// The transpose of `TransformFilter`.
inline void TransformFilterBack(const Vector u[kInputs], Vector g[3]) {
  const Vector sum = (u[1] + u[2]) * (-1.f / 6), sum2 = u[3] + u[4];
  g[0] = u[0] * (1.f / 4) + sum + sum2 * (1.f / 24);
  g[1] = (u[2] - u[1]) * (1.f / 6) + (u[3] - u[4]) * (1.f / 12);
  g[2] = sum + sum2 * (1.f / 6) + u[5];
}

inline void TransformInput(const Vector d[kInputs], Vector v[kInputs]) {
  const Vector even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
  const Vector even2 = d[4] - d[2], odd2 = 2 * (d[3] - d[1]);
  v[0] = 4 * d[0] - 5 * d[2] + d[4];
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = even2 + odd2;
  v[4] = even2 - odd2;
  v[5] = 4 * d[1] - 5 * d[3] + d[5];
}

inline void TransformOutput(const Vector m[kInputs], Vector y[kOutputs]) {
  const Vector sum = m[1] + m[2], difference = m[1] - m[2];
  const Vector sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  y[0] = m[0] + sum + sum2;
  y[1] = difference + 2 * difference2;
  y[2] = sum + 4 * sum2;
  y[3] = difference + 8 * difference2 + m[5];
}

// The transpose of `TransformOutput`.
inline void TransformOutputBack(const Vector y[kOutputs], Vector m[kInputs]) {
  const Vector even = y[0] + y[2], odd = y[1] + y[3];
  const Vector even2 = y[0] + 4 * y[2], odd2 = 2 * y[1] + 8 * y[3];
  m[0] = y[0];
  m[1] = even + odd;
  m[2] = even - odd;
  m[3] = even2 + odd2;
  m[4] = even2 - odd2;
  m[5] = y[3];
}

// Transforms a square of kFrom x kFrom vectors into one of kTo x kTo, given the
// transform of a column.
template <int kFrom, int kTo, void (*kTransform)(const Vector*, Vector*),
          typename Read, typename Write>
inline void TransformSquare(const Read& read, const Write& write) {
  Vector half[kTo][kFrom];
  for (int j = 0; j < kFrom; ++j) {
    Vector column[kFrom], transformed[kTo];
    for (int i = 0; i < kFrom; ++i) column[i] = read(i, j);
    kTransform(column, transformed);
    for (int i = 0; i < kTo; ++i) half[i][j] = transformed[i];
  }
  for (int i = 0; i < kTo; ++i) {
    Vector transformed[kTo];
    kTransform(half[i], transformed);
    for (int j = 0; j < kTo; ++j) write(i, j, transformed[j]);
  }
}

// [3, 3, kIn, kOut] to [36, kOut / 16, kIn, 16].
template <int kIn, int kOut>
void TransformFilters(const float* filter, float* transformed) {
  for (int in = 0; in < kIn; ++in) {
    for (int out = 0; out < kOut; out += kLanes) {
      TransformSquare<3, kInputs, TransformFilter>(
          [=](int i, int j) {
            return Load(filter + ((3 * i + j) * kIn + in) * kOut + out);
          },
          [=](int i, int j, Vector value) {
            Store<false>(transformed + (kInputs * i + j) * kIn * kOut +
                             out * kIn + in * kLanes,
                         value);
          });
    }
  }
}

// Transforms the inputs of `count` tiles to [36, kBlock, kStride], in which the
// first kIn are used.
template <int kIn, int kStride, int kBlock, bool kRelu>
void TransformInputs(const Pictures& pictures, const float* input, Tile tile,
                     int count, float* transformed) {
  const int64_t line = pictures.width * kIn;
  for (int t = 0; t < count; ++t, tile.Next()) {
    // From one pixel left of and above the tile's outputs.
    const float* first = input + (tile.pixel() - pictures.width - 1) * kIn;
    const int64_t y = tile.y() - 1, x = tile.x() - 1;
    const bool inside = y >= 0 && x >= 0 && y + kInputs <= pictures.height &&
                        x + kInputs <= pictures.width;
    for (int in = 0; in < kIn; in += kLanes) {
      const auto write = [=](int i, int j, Vector value) {
        Store<false>(
            transformed + ((kInputs * i + j) * kBlock + t) * kStride + in,
            value);
      };
      const auto read = [=](int i, int j) {
        const Vector value = Load(first + i * line + j * kIn + in);
        return kRelu ? Relu(value) : value;
      };
      if (inside) {
        TransformSquare<kInputs, kInputs, TransformInput>(read, write);
      } else {
        TransformSquare<kInputs, kInputs, TransformInput>(
            [=](int i, int j) {
              return y + i >= 0 && y + i < pictures.height && x + j >= 0 &&
                             x + j < pictures.width
                         ? read(i, j)
                         : Vector{};
            },
            write);
      }
    }
  }
}

// Multiplies matrices of kTiles x kIn by those of kIn x kOut, in place.
template <int kIn, int kOut, int kStride>
void Multiply(const float* filter, float* block) {
  constexpr int kVectors = kOut / kLanes;
  for (int p = 0; p < kProducts; ++p) {
    Vector sums[kTiles][kVectors] = {};
    for (int in = 0; in < kIn; ++in) {
      Vector weights[kVectors];
      for (int k = 0; k < kVectors; ++k) {
        weights[k] = Load(filter + (k * kIn + in) * kLanes);
      }
      for (int t = 0; t < kTiles; ++t) {
        for (int k = 0; k < kVectors; ++k) {
          sums[t][k] += block[t * kStride + in] * weights[k];
        }
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      for (int k = 0; k < kVectors; ++k) {
        Store<false>(block + t * kStride + k * kLanes, sums[t][k]);
      }
    }
    filter += kIn * kOut;
    block += kTiles * kStride;
  }
}

template <int kOut, int kStride, bool kStream>
void TransformOutputs(const Pictures& pictures, const float* block,
                      const Epilogue& epilogue, Tile tile, int count,
                      float* output) {
  for (int t = 0; t < count; ++t, tile.Next()) {
    const int64_t height = tile.height(), width = tile.width();
    for (int out = 0; out < kOut; out += kLanes) {
      const int64_t first = tile.pixel() * kOut + out;
      const Vector bias =
          epilogue.bias == nullptr ? Vector{} : Load(epilogue.bias + out);
      TransformSquare<kInputs, kOutputs, TransformOutput>(
          [=](int i, int j) {
            return Load(block + ((kInputs * i + j) * kTiles + t) * kStride +
                        out);
          },
          [=](int i, int j, Vector value) {
            if (i >= height || j >= width) return;
            const int64_t place = first + (i * pictures.width + j) * kOut;
            value += bias;
            if (epilogue.mask != nullptr) {
              value = Load(epilogue.mask + place) > 0 ? value : Vector{};
            }
            if (epilogue.residual != nullptr) {
              value += Load(epilogue.residual + place);
            }
            Store<kStream>(output + place, value);
          });
    }
  }
#ifdef __AVX512F__
  if (kStream) __builtin_ia32_sfence();
#endif
}

// Convolves tiles `begin` to `end`.
template <int kIn, int kOut, bool kRelu, bool kStream>
void Convolve(const Pictures& pictures, const float* input, const float* filter,
              const Epilogue& epilogue, int64_t begin, int64_t end,
              float* output) {
  constexpr int kStride = std::max(kIn, kOut);
  // A last block may be part of one, but is multiplied as a whole.
  alignas(64) float block[kProducts * kTiles * kStride] = {};
  for (; begin < end; begin += kTiles) {
    const int count = std::min<int64_t>(kTiles, end - begin);
    const Tile tile(pictures, begin);
    TransformInputs<kIn, kStride, kTiles, kRelu>(pictures, input, tile, count,
                                                 block);
    Multiply<kIn, kOut, kStride>(filter, block);
    TransformOutputs<kOut, kStride, kStream>(pictures, block, epilogue, tile,
                                             count, output);
  }
}

template <int kOut>
void TransformGradients(const Pictures& pictures, const float* gradient,
                        Tile tile, int count, float* transformed) {
  for (int t = 0; t < count; ++t, tile.Next()) {
    const int64_t height = tile.height(), width = tile.width();
    for (int out = 0; out < kOut; out += kLanes) {
      const float* first = gradient + tile.pixel() * kOut + out;
      TransformSquare<kOutputs, kInputs, TransformOutputBack>(
          [=](int i, int j) {
            return i < height && j < width
                       ? Load(first + (i * pictures.width + j) * kOut)
                       : Vector{};
          },
          [=](int i, int j, Vector value) {
            Store<false>(transformed +
                             ((kInputs * i + j) * kGradientTiles + t) * kOut +
                             out,
                         value);
          });
    }
  }
}

// Adds products of kIn x `count` by `count` x kOut to `sums`, [36, kIn, kOut].
template <int kIn, int kOut>
void AddProducts(const float* inputs, const float* gradients, int count,
                 float* sums) {
  constexpr int kVectors = kOut / kLanes;
  constexpr int kRows = 16 / kVectors;  // As many as there are registers for.
  for (int p = 0; p < kProducts; ++p) {
    for (int row = 0; row < kIn; row += kRows) {
      Vector sum[kRows][kVectors];
      for (int r = 0; r < kRows; ++r) {
        for (int k = 0; k < kVectors; ++k) {
          sum[r][k] = Load(sums + (row + r) * kOut + k * kLanes);
        }
      }
      for (int t = 0; t < count; ++t) {
        Vector gradient[kVectors];
        for (int k = 0; k < kVectors; ++k) {
          gradient[k] = Load(gradients + t * kOut + k * kLanes);
        }
        for (int r = 0; r < kRows; ++r) {
          for (int k = 0; k < kVectors; ++k) {
            sum[r][k] += inputs[t * kIn + row + r] * gradient[k];
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int k = 0; k < kVectors; ++k) {
          Store<false>(sums + (row + r) * kOut + k * kLanes, sum[r][k]);
        }
      }
    }
    inputs += kGradientTiles * kIn;
    gradients += kGradientTiles * kOut;
    sums += kIn * kOut;
  }
}

// For the gradient of outputs of tiles `begin` to `end`, computes that of their
// inputs, given the transform of the filter turned around, and sums what they
// add to the transformed gradient of the filter, [36, kIn, kOut], and, behind
// it, to that of the bias, [kOut]. What one needs is in the cache for the
// other.
template <int kIn, int kOut, bool kRelu, bool kStream>
void Gradients(const Pictures& pictures, const float* gradient,
               const float* input, const float* filter,
               const Epilogue& epilogue, int64_t begin, int64_t end,
               float* input_gradient, float* sums) {
  alignas(64) float inputs[kProducts * kGradientTiles * kIn];
  alignas(64) float gradients[kProducts * kGradientTiles * kOut];
  memset(sums, 0, (kProducts * kIn + 1) * kOut * sizeof(float));
  for (; begin < end; begin += kGradientTiles) {
    const int count = std::min<int64_t>(kGradientTiles, end - begin);
    const Tile tile(pictures, begin);
    TransformInputs<kIn, kIn, kGradientTiles, kRelu>(pictures, input, tile,
                                                     count, inputs);
    TransformGradients<kOut>(pictures, gradient, tile, count, gradients);
    AddProducts<kIn, kOut>(inputs, gradients, count, sums);
    // The second of the second line is the sum of all 16 of a tile.
    const float* whole = gradients + (kInputs + 1) * kGradientTiles * kOut;
    float* bias = sums + kProducts * kIn * kOut;
    for (int i = 0; i < count * kOut; i += kLanes) {
      Store<false>(bias + i % kOut, Load(bias + i % kOut) + Load(whole + i));
    }
    Convolve<kOut, kIn, false, kStream>(pictures, gradient, filter, epilogue,
                                        begin, begin + count, input_gradient);
  }
}

// Transforms the sums of all chunks back, for one channel of the input.
template <int kIn, int kOut>
void FinishGradient(int64_t chunks, int in, float* sums, float* filter) {
  constexpr int kSize = (kProducts * kIn + 1) * kOut;
  for (int out = 0; out < kOut; out += kLanes) {
    TransformSquare<kInputs, 3, TransformFilterBack>(
        [=](int i, int j) {
          const float* place =
              sums + ((kInputs * i + j) * kIn + in) * kOut + out;
          Vector sum = {};
          for (int64_t c = 0; c < chunks; ++c) sum += Load(place + c * kSize);
          return sum;
        },
        [=](int i, int j, Vector value) {
          Store<false>(filter + ((3 * i + j) * kIn + in) * kOut + out, value);
        });
  }
}

#ifdef __x86_64__
#pragma GCC pop_options
#endif

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;
namespace errors = tensorflow::errors;

bool Supported() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

// The functions for some numbers of channels.
struct Functions {
  int in;
  int out;
  decltype(&TransformFilters<16, 16>) transform_filters;
  decltype(&Convolve<16, 16, false, false>) convolve[2][2];  // [relu][stream]
  decltype(&Gradients<16, 16, false, false>) gradients[2][2];
  decltype(&FinishGradient<16, 16>) finish_gradient;
};

template <int kIn, int kOut>
constexpr Functions For() {
  return {
      kIn,
      kOut,
      TransformFilters<kIn, kOut>,
      {{Convolve<kIn, kOut, false, false>, Convolve<kIn, kOut, false, true>},
       {Convolve<kIn, kOut, true, false>, Convolve<kIn, kOut, true, true>}},
      {{Gradients<kIn, kOut, false, false>, Gradients<kIn, kOut, false, true>},
       {Gradients<kIn, kOut, true, false>, Gradients<kIn, kOut, true, true>}},
      FinishGradient<kIn, kOut>};
}

constexpr Functions kFunctions[] = {For<16, 16>(), For<16, 32>(), For<32, 16>(),
                                    For<32, 32>()};

// Finds them for a filter, [3, 3, in, out].
absl::Status Find(const TensorShape& filter, const Functions** functions) {
  for (const Functions& candidate : kFunctions) {
    if (filter == TensorShape({3, 3, candidate.in, candidate.out})) {
      *functions = &candidate;
      return absl::OkStatus();
    }
  }
  return errors::InvalidArgument("A filter is [3, 3, 16 or 32, 16 or 32], not ",
                                 filter.DebugString());
}

// Checks that a tensor is [images, height, width, channels].
absl::Status CheckPictures(const Tensor& tensor, int channels) {
  if (tensor.dims() == 4 && tensor.dim_size(3) == channels) {
    return absl::OkStatus();
  }
  return errors::InvalidArgument("Expected pictures of ", channels,
                                 " channels, not ",
                                 tensor.shape().DebugString());
}

// Checks that a tensor has this shape.
absl::Status CheckShape(const Tensor& tensor, const TensorShape& shape) {
  if (tensor.shape() == shape) return absl::OkStatus();
  return errors::InvalidArgument("Expected ", shape.DebugString(), ", not ",
                                 tensor.shape().DebugString());
}

TensorShape WithChannels(const Tensor& pictures, int channels) {
  TensorShape shape = pictures.shape();
  shape.set_dim(3, channels);
  return shape;
}

Pictures PicturesOf(const Tensor& tensor) {
  return {tensor.dim_size(0), tensor.dim_size(1), tensor.dim_size(2)};
}

// Calls work(begin, end) for parts of 0 to `total`, in TensorFlow's threads.
template <typename Work>
void Divide(OpKernelContext* context, int64_t total, int64_t cycles,
            const Work& work) {
  const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(threads.num_threads, threads.workers, total, cycles, work);
}

class Kernel : public OpKernel {
 public:
  explicit Kernel(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES(context, Supported(),
                errors::Unimplemented("This processor has no AVX-512."));
    OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

 protected:
  bool relu_;
};

class Convolution : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Tensor& filter = context->input(1);
    const Tensor& bias = context->input(2);
    const Functions* functions;
    OP_REQUIRES_OK(context, Find(filter.shape(), &functions));
    OP_REQUIRES_OK(context, CheckPictures(input, functions->in));
    OP_REQUIRES_OK(context, CheckShape(bias, {functions->out}));
    Epilogue epilogue = {bias.flat<float>().data()};
    const TensorShape shape = WithChannels(input, functions->out);
    if (context->num_inputs() > 3) {
      const Tensor& residual = context->input(3);
      OP_REQUIRES_OK(context, CheckShape(residual, shape));
      epilogue.residual = residual.flat<float>().data();
    }
    Tensor transformed, *output;
    OP_REQUIRES_OK(
        context, context->allocate_temp(
                     tensorflow::DT_FLOAT,
                     {kProducts, functions->in, functions->out}, &transformed));
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
    functions->transform_filters(filter.flat<float>().data(),
                                 transformed.flat<float>().data());
    const Pictures pictures = PicturesOf(input);
    const int64_t tiles = pictures.tiles();
    const bool stream = output->TotalBytes() >= kStreamed;
    Divide(context, (tiles + kTiles - 1) / kTiles,
           kTiles * kProducts * functions->in * functions->out / kLanes,
           [&](int64_t begin, int64_t end) {
             functions->convolve[relu_][stream](
                 pictures, input.flat<float>().data(),
                 transformed.flat<float>().data(), epilogue, begin * kTiles,
                 std::min(end * kTiles, tiles), output->flat<float>().data());
           });
  }
};

// [3, 3, in, out] to [3, 3, out, in], with places in the opposite order. With
// that, the outputs around an input, in which it is, give its gradient.
void Turn(const Tensor& filter, Tensor* turned) {
  const int64_t in = filter.dim_size(2), out = filter.dim_size(3);
  const auto from = filter.shaped<float, 3>({9, in, out});
  auto to = turned->shaped<float, 3>({9, out, in});
  for (int place = 0; place < 9; ++place) {
    for (int i = 0; i < in; ++i) {
      for (int o = 0; o < out; ++o) to(8 - place, o, i) = from(place, i, o);
    }
  }
}

class Gradient : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& gradient = context->input(0);
    const Tensor& input = context->input(1);
    const Tensor& filter = context->input(2);
    const Functions *functions, *turned_functions;
    OP_REQUIRES_OK(context, Find(filter.shape(), &functions));
    const int64_t in = functions->in, out = functions->out;
    const TensorShape turned_shape({3, 3, out, in});
    OP_REQUIRES_OK(context, Find(turned_shape, &turned_functions));
    OP_REQUIRES_OK(context, CheckPictures(input, in));
    OP_REQUIRES_OK(context, CheckShape(gradient, WithChannels(input, out)));

    const Pictures pictures = PicturesOf(input);
    const int64_t tiles = pictures.tiles();
    const int64_t chunks = (tiles + kChunkTiles - 1) / kChunkTiles;
    const int64_t size = (kProducts * in + 1) * out;
    Tensor turned, transformed, sums;
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT,
                                                   turned_shape, &turned));
    OP_REQUIRES_OK(context,
                   context->allocate_temp(tensorflow::DT_FLOAT,
                                          {kProducts, out, in}, &transformed));
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT,
                                                   {chunks, size}, &sums));
    Tensor *input_gradient, *filter_gradient, *bias_gradient;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, input.shape(), &input_gradient));
    OP_REQUIRES_OK(
        context, context->allocate_output(1, filter.shape(), &filter_gradient));
    OP_REQUIRES_OK(context, context->allocate_output(2, {out}, &bias_gradient));

    Turn(filter, &turned);
    turned_functions->transform_filters(turned.flat<float>().data(),
                                        transformed.flat<float>().data());
    Epilogue epilogue = {};
    if (relu_) epilogue.mask = input.flat<float>().data();
    const bool stream = input.TotalBytes() >= kStreamed;
    float* const first = sums.flat<float>().data();
    Divide(context, chunks, 2 * kChunkTiles * kProducts * in * out / kLanes,
           [&](int64_t begin, int64_t end) {
             for (int64_t c = begin; c < end; ++c) {
               functions->gradients[relu_][stream](
                   pictures, gradient.flat<float>().data(),
                   input.flat<float>().data(), transformed.flat<float>().data(),
                   epilogue, c * kChunkTiles,
                   std::min((c + 1) * kChunkTiles, tiles),
                   input_gradient->flat<float>().data(), first + c * size);
             }
           });
    Divide(context, in, chunks * kProducts * out / kLanes,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               functions->finish_gradient(
                   chunks, i, first, filter_gradient->flat<float>().data());
             }
           });
    auto bias = bias_gradient->flat<float>();
    bias.setZero();
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t o = 0; o < out; ++o) {
        bias(o) += first[(c + 1) * size - out + o];
      }
    }
  }
};

// [N, height, width, in], [3, 3, in, out] to [N, height, width, out].
absl::Status ConvolutionShape(InferenceContext* context) {
  ShapeHandle input, filter, output;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &input));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &filter));
  TF_RETURN_IF_ERROR(
      context->ReplaceDim(input, 3, context->Dim(filter, 3), &output));
  context->set_output(0, output);
  return absl::OkStatus();
}

REGISTER_OP("Conv3x3")
    .Input("input: float")
    .Input("filter: float")
    .Input("bias: float")
    .Input("residual: num_residuals * float")
    .Output("output: float")
    .Attr("relu: bool")
    .Attr("num_residuals: int >= 0")
    .SetShapeFn(ConvolutionShape)
    .Doc(R"doc(
Convolves pictures, [N, height, width, in], with 3x3 pixels, stride 1 and as much
padding with zeros as keeps their size.

relu: whether the input goes through a ReLU first.
residual: none or one, of the output's shape, added to it.
)doc");

REGISTER_OP("Conv3x3Gradient")
    .Input("gradient: float")
    .Input("input: float")
    .Input("filter: float")
    .Output("input_gradient: float")
    .Output("filter_gradient: float")
    .Output("bias_gradient: float")
    .Attr("relu: bool")
    .SetShapeFn([](InferenceContext* context) {
      ShapeHandle filter;
      TF_RETURN_IF_ERROR(context->WithRank(context->input(2), 4, &filter));
      context->set_output(0, context->input(1));
      context->set_output(1, filter);
      context->set_output(2, context->Vector(context->Dim(filter, 3)));
      return absl::OkStatus();
    })
    .Doc("The gradients of `Conv3x3`, given that of its output.");

REGISTER_KERNEL_BUILDER(Name("Conv3x3").Device(tensorflow::DEVICE_CPU),
                        Convolution);
REGISTER_KERNEL_BUILDER(Name("Conv3x3Gradient").Device(tensorflow::DEVICE_CPU),
                        Gradient);

}  // namespace
}  // namespace impala

// Whether this processor can run the ops.
extern "C" bool ImpalaConvolutionSupported() { return impala::Supported(); }
