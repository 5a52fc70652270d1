// Licensed under the Apache License, Version 2.0; see LICENSE.
//
// Sections of the paper's deep network: a convolution of 3x3 pixels, a pool and
// residual blocks, with few channels, as TensorFlow ops for processors with
// AVX-512.
//
// The convolutions are Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv
// 1509.09308): a tile of 4x4 outputs depends on 6x6 inputs, and with both
// transformed, 36 products per pair of channels give what takes 144 otherwise.
// With 16 or 32 channels all that belongs to a dozen tiles fits the processor's
// innermost caches, where oneDNN, which TensorFlow uses, would come back to
// memory between steps:
//
//   1. the filter, [3, 3, in, out], becomes [36, in, out], once per call;
//   2. a block of tiles becomes [36, tiles, in];
//   3. 36 products of matrices make it [36, tiles, out], in place;
//   4. these become 4x4 outputs each, to which the bias is added and so on.
//
// A vector holds 16 channels of one pixel. With bfloat16, factors of the third
// step are rounded to it, and sums are of float32.
//
// The gradient of the input is a convolution of the output's gradient. That of
// the filter transforms inputs and outputs' gradients, multiplies them and sums
// up the products.
//
// A few pictures at a time go through all of a section, so that what is between
// its steps stays in the cache. Pictures are divided among TensorFlow's
// threads; the sums for the gradients of filters are of chunks of them that
// don't depend on the number of threads, so neither does the result. Pictures
// of 1, 3 or 4 channels are convolved pixel by pixel.

#ifdef __x86_64__
#include <cpuid.h>
#endif

// Since then, compilers compare, choose and convert vectors as they do numbers.
#if !defined(__x86_64__)
#elif defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 9
#define IMPALA_AVX512
#else
#warning "This compiler is too old for AVX-512: TensorFlow will convolve."
#endif

// Returns whether the processor has instructions for bfloat16.
extern "C" bool ImpalaHasBfloat16() {
#ifdef __x86_64__
  // Compilers know `avx512bf16` by name only since they have its instructions.
  constexpr unsigned int kBit = 1u << 5;  // Of CPUID.(7, 1):EAX.
  unsigned int eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx512f") &&
         __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kBit) != 0;
#else
  return false;
#endif
}

#ifdef IMPALA_AVX512

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/util/work_sharder.h"

namespace impala {
namespace {

constexpr int kLanes = 16;
constexpr int kOutputs = 4;                      // Along a side of a tile.
constexpr int kInputs = 6;                       // The same.
constexpr int kProducts = kInputs * kInputs;     // Per tile and channels.
constexpr int kTiles = 12;                       // Of a block.
constexpr int kGradientTiles = 24;               // The same, for filters.
constexpr int64_t kCached = int64_t{1} << 17;    // Bytes between two steps.
constexpr int64_t kStreamed = int64_t{4} << 20;  // Bytes; see `Epilogue`.
constexpr int64_t kChunkImages = 8;              // At least, summed apart.
constexpr int64_t kChunks = 64;                  // At most.
constexpr int kPixels = 12;                      // Convolved at once.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
// The same somewhere in memory.
typedef float Unaligned
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef float UnalignedFloat __attribute__((aligned(2), may_alias));
typedef uint16_t UnalignedHalves
    __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint8_t UnalignedBytes
    __attribute__((vector_size(kLanes), aligned(1), may_alias));

// Pictures, [images, height, width, channels], in tiles.
struct Pictures {
  int64_t images;
  int64_t height;
  int64_t width;

  int64_t rows() const { return (height + kOutputs - 1) / kOutputs; }
  int64_t columns() const { return (width + kOutputs - 1) / kOutputs; }
  int64_t tiles() const { return images * rows() * columns(); }
  int64_t pixels() const { return height * width; }
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
  // Where a copy goes past the caches, which a large result will have left when
  // it is read again; null for none. So its place needn't be fetched before.
  float* copy;
};

// The only functions with such instructions: no code that runs while the
// library is loaded may have them. Those for bfloat16 are where it is asked
// for.
#if defined(__clang__)
#define IMPALA_BFLOAT16
#pragma clang attribute push(                                        \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))), \
    apply_to = function)
#elif __GNUC__ >= 10
#define IMPALA_BFLOAT16
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16")
#else
#warning "This compiler is too old for AVX-512 BF16: float32 alone is built."
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

// Two ones of bfloat16 as a float.
constexpr float kPairOfOnes = 0x1.007fp0f;

inline Vector Load(const float* place) {
  return *reinterpret_cast<const Unaligned*>(place);
}

inline void Store(float* place, Vector value) {
  *reinterpret_cast<Unaligned*>(place) = value;
}

inline void Stream(float* place, Vector value) {
  _mm512_stream_ps(place, value);
}

#ifdef IMPALA_BFLOAT16
constexpr bool kHasBfloat16 = true;

inline Halves ToBfloat16(Vector value) {
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(value));
}

// Adds the products of pairs of numbers.
inline Vector AddPairs(Vector sum, Vector pairs, Vector others) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs),
                          reinterpret_cast<__m512bh>(others));
}
#else
constexpr bool kHasBfloat16 = false;

// For the compiler alone: nothing calls them.
[[maybe_unused]] Halves ToBfloat16(Vector value);
[[maybe_unused]] Vector AddPairs(Vector sum, Vector pairs, Vector others);
#endif

// Rounds to bfloat16.
inline void Store(uint16_t* place, Vector value) {
  *reinterpret_cast<UnalignedHalves*>(place) = ToBfloat16(value);
}

// What factors of products are kept as.
template <bool kBfloat16>
using Number = std::conditional_t<kBfloat16, uint16_t, float>;

// A pair of numbers of bfloat16 takes the place of a float. The first is in the
// lower half.
inline Vector Pairs(Vector first, Vector second) {
  const Integers low = __builtin_convertvector(ToBfloat16(first), Integers);
  const Integers high = __builtin_convertvector(ToBfloat16(second), Integers);
  return reinterpret_cast<Vector>(low | high << 16);
}

// Adds the products of a number and those of a vector, or of a pair and pairs.
template <bool kBfloat16>
inline Vector AddProduct(Vector sum, float factor, Vector factors) {
  if constexpr (kBfloat16) {
    return AddPairs(sum, _mm512_set1_ps(factor), factors);
  } else {
    return sum + factor * factors;
  }
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

// [3, 3, kIn, kOut] to [36, kOut / 16, kIn, 16], with bfloat16 to pairs of
// inputs, [36, kOut / 16, kIn / 2, 16].
template <int kIn, int kOut, bool kBfloat16>
void TransformFilters(const float* filter, float* transformed) {
  constexpr int kStep = kBfloat16 ? 2 : 1;
  const auto transform = [=](int in, int out, const auto& write) {
    TransformSquare<3, kInputs, TransformFilter>(
        [=](int i, int j) {
          return Load(filter + ((3 * i + j) * kIn + in) * kOut + out);
        },
        write);
  };
  for (int in = 0; in < kIn; in += kStep) {
    for (int out = 0; out < kOut; out += kLanes) {
      Vector products[kInputs][kInputs];
      transform(in, out,
                [&](int i, int j, Vector value) { products[i][j] = value; });
      if constexpr (kBfloat16) {
        transform(in + 1, out, [&](int i, int j, Vector value) {
          products[i][j] = Pairs(products[i][j], value);
        });
      }
      float* first = transformed + (out * kIn + in * kLanes) / kStep;
      for (int p = 0; p < kProducts; ++p) {
        Store(first + p * kIn * kOut / kStep,
              products[p / kInputs][p % kInputs]);
      }
    }
  }
}

// How vectors of tiles are kept: as they are, rounded to bfloat16 in half of
// the place, or rounded and paired with those of the next tile.
enum Format { kFloats, kRounded, kPaired };

// Keeps what is at `offset` of tile `number`'s row of [tiles, kStride].
template <Format kFormat, int kStride>
inline void Keep(float* rows, int number, int offset, Vector value) {
  if constexpr (kFormat == kFloats) {
    Store(rows + number * kStride + offset, value);
  } else if constexpr (kFormat == kRounded) {
    Store(reinterpret_cast<uint16_t*>(rows + number * kStride) + offset, value);
  } else {
    float* place = rows + number / 2 * kStride + offset;
    if (number % 2 == 0) {
      Store(place, Pairs(value, Vector{}));
    } else {
      const Vector second = Pairs(Vector{}, value);
      Store(place,
            reinterpret_cast<Vector>(reinterpret_cast<Integers>(Load(place)) |
                                     reinterpret_cast<Integers>(second)));
    }
  }
}

// Transforms the inputs of `count` tiles to [36, kBlock, kStride], in which the
// first kIn are used.
template <int kIn, int kStride, int kBlock, bool kRelu, Format kFormat>
void TransformInputs(const Pictures& pictures, const float* input, Tile tile,
                     int count, float* transformed) {
  const int64_t line = pictures.width * kIn;
  for (int t = 0; t < count; ++t, tile.Next()) {
    // From one pixel left of and above the tile's outputs.
    const int64_t first = (tile.pixel() - pictures.width - 1) * kIn;
    const int64_t y = tile.y() - 1, x = tile.x() - 1;
    const bool inside = y >= 0 && x >= 0 && y + kInputs <= pictures.height &&
                        x + kInputs <= pictures.width;
    for (int in = 0; in < kIn; in += kLanes) {
      const auto write = [=](int i, int j, Vector value) {
        Keep<kFormat, kStride>(
            transformed + (kInputs * i + j) * kBlock * kStride, t, in, value);
      };
      const auto read = [=](int i, int j) {
        const Vector value = Load(input + (first + i * line + j * kIn + in));
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
template <int kIn, int kOut, int kStride, bool kBfloat16>
void Multiply(const float* filter, float* block) {
  constexpr int kVectors = kOut / kLanes;
  constexpr int kFactors = kBfloat16 ? kIn / 2 : kIn;
  for (int p = 0; p < kProducts; ++p) {
    Vector sums[kTiles][kVectors] = {};
    for (int in = 0; in < kFactors; ++in) {
      Vector weights[kVectors];
      for (int k = 0; k < kVectors; ++k) {
        weights[k] = Load(filter + (k * kFactors + in) * kLanes);
      }
      for (int t = 0; t < kTiles; ++t) {
        for (int k = 0; k < kVectors; ++k) {
          sums[t][k] = AddProduct<kBfloat16>(
              sums[t][k], block[t * kStride + in], weights[k]);
        }
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      for (int k = 0; k < kVectors; ++k) {
        Store(block + t * kStride + k * kLanes, sums[t][k]);
      }
    }
    filter += kFactors * kOut;
    block += kTiles * kStride;
  }
}

template <int kOut, int kStride>
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
            Store(output + place, value);
            if (epilogue.copy != nullptr) Stream(epilogue.copy + place, value);
          });
    }
  }
}

// Convolves tiles `begin` to `end`.
template <int kIn, int kOut, bool kRelu, bool kBfloat16>
void ConvolveTiles(const Pictures& pictures, const float* input,
                   const float* filter, const Epilogue& epilogue, int64_t begin,
                   int64_t end, float* output) {
  constexpr int kStride = std::max(kIn, kOut);
  alignas(64) float block[kProducts * kTiles * kStride];
  // A last block may be part of one, but is multiplied as a whole.
  if ((end - begin) % kTiles != 0) memset(block, 0, sizeof(block));
  for (; begin < end; begin += kTiles) {
    const int count = std::min<int64_t>(kTiles, end - begin);
    const Tile tile(pictures, begin);
    TransformInputs<kIn, kStride, kTiles, kRelu,
                    kBfloat16 ? kRounded : kFloats>(pictures, input, tile,
                                                    count, block);
    Multiply<kIn, kOut, kStride, kBfloat16>(filter, block);
    TransformOutputs<kOut, kStride>(pictures, block, epilogue, tile, count,
                                    output);
  }
}

// Convolves all pictures.
template <int kIn, int kOut, bool kRelu, bool kBfloat16>
void Convolve(const Pictures& pictures, const float* input, const float* filter,
              const Epilogue& epilogue, float* output) {
  ConvolveTiles<kIn, kOut, kRelu, kBfloat16>(pictures, input, filter, epilogue,
                                             0, pictures.tiles(), output);
}

template <int kOut, Format kFormat>
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
            Keep<kFormat, kOut>(
                transformed + (kInputs * i + j) * kGradientTiles * kOut, t, out,
                value);
          });
    }
  }
}

// Adds products of kIn x `count` by `count` x kOut to `sums`, [36, kIn, kOut].
template <int kIn, int kOut, bool kBfloat16>
void AddProducts(const float* inputs, const float* gradients, int count,
                 float* sums) {
  constexpr int kVectors = kOut / kLanes;
  // With more rows at once, sums wouldn't all stay in registers.
  constexpr int kRows = 16 / kVectors;
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
            sum[r][k] = AddProduct<kBfloat16>(
                sum[r][k], inputs[t * kIn + row + r], gradient[k]);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int k = 0; k < kVectors; ++k) {
          Store(sums + (row + r) * kOut + k * kLanes, sum[r][k]);
        }
      }
    }
    inputs += kGradientTiles * kIn;
    gradients += kGradientTiles * kOut;
    sums += kIn * kOut;
  }
}

// For the gradient of outputs, computes that of the inputs, given the transform
// of the filter turned around, and sums what they add to the transformed
// gradient of the filter, [36, kIn, kOut], and, behind it, to that of the bias,
// [kOut].
template <int kIn, int kOut, bool kRelu, bool kBfloat16>
void Gradients(const Pictures& pictures, const float* gradient,
               const float* input, const float* filter,
               const Epilogue& epilogue, float* input_gradient, float* sums) {
  alignas(64) float inputs[kProducts * kGradientTiles * kIn];
  alignas(64) float gradients[kProducts * kGradientTiles * kOut];
  const int64_t end = pictures.tiles();
  for (int64_t begin = 0; begin < end; begin += kGradientTiles) {
    const int count = std::min<int64_t>(kGradientTiles, end - begin);
    const Tile tile(pictures, begin);
    constexpr Format kFormat = kBfloat16 ? kPaired : kFloats;
    TransformInputs<kIn, kIn, kGradientTiles, kRelu, kFormat>(
        pictures, input, tile, count, inputs);
    TransformGradients<kOut, kFormat>(pictures, gradient, tile, count,
                                      gradients);
    const int rows = kBfloat16 ? (count + 1) / 2 : count;
    AddProducts<kIn, kOut, kBfloat16>(inputs, gradients, rows, sums);
    // The second of the second line is the sum of all 16 of a tile.
    const float* whole = gradients + (kInputs + 1) * kGradientTiles * kOut;
    const float ones = kBfloat16 ? kPairOfOnes : 1;
    float* bias = sums + kProducts * kIn * kOut;
    for (int i = 0; i < rows * kOut; i += kLanes) {
      Store(bias + i % kOut, AddProduct<kBfloat16>(Load(bias + i % kOut), ones,
                                                   Load(whole + i)));
    }
    ConvolveTiles<kOut, kIn, false, kBfloat16>(pictures, gradient, filter,
                                               epilogue, begin, begin + count,
                                               input_gradient);
  }
}

// How many vectors of outputs a prepared filter has, and with it its gradient.
template <int kIn>
constexpr int Rows() {
  return kIn % kLanes == 0 ? kProducts * kIn : 9 * kIn;
}

// Prepares a filter, [3, 3, kIn, kOut].
template <int kIn, int kOut, bool kBfloat16>
void Prepare(const float* filter, float* prepared) {
  if constexpr (kIn % kLanes == 0) {
    TransformFilters<kIn, kOut, kBfloat16>(filter, prepared);
  } else if constexpr (kBfloat16) {
    // Pairs of numbers of a line; the last one's partner is zero.
    for (int row = 0; row < 3; ++row, filter += 3 * kIn * kOut) {
      for (int in = 0; in < 3 * kIn; in += 2, prepared += kOut) {
        for (int out = 0; out < kOut; out += kLanes) {
          const float* first = filter + in * kOut + out;
          Store(prepared + out,
                Pairs(Load(first),
                      in + 1 < 3 * kIn ? Load(first + kOut) : Vector{}));
        }
      }
    }
  } else {
    memcpy(prepared, filter, Rows<kIn>() * kOut * sizeof(float));
  }
}

// Prepares the filter [3, 3, out, in] with places in the opposite order. With
// that, the outputs around an input, in which it is, give its gradient; there
// is none for few channels.
template <int kIn, int kOut, bool kBfloat16>
void PrepareTurned(const float* filter, float* prepared) {
  if constexpr (kIn % kLanes == 0) {
    float turned[9 * kIn * kOut];
    for (int place = 0; place < 9; ++place) {
      float* to = turned + (8 - place) * kIn * kOut;
      for (int i = 0; i < kIn; ++i) {
        for (int o = 0; o < kOut; ++o) to[o * kIn + i] = *filter++;
      }
    }
    Prepare<kOut, kIn, kBfloat16>(turned, prepared);
  }
}

// Adds up the gradients of all chunks, `stride` floats apart, for one channel
// of the input, and undoes their transform.
template <int kIn, int kOut>
void FinishGradient(int64_t chunks, int64_t stride, int in, const float* sums,
                    float* filter) {
  const auto sum = [=](int row, int out) {
    const float* place = sums + (row * kIn + in) * kOut + out;
    Vector sum = {};
    for (int64_t c = 0; c < chunks; ++c) sum += Load(place + c * stride);
    return sum;
  };
  const auto write = [=](int row, int out, Vector value) {
    Store(filter + (row * kIn + in) * kOut + out, value);
  };
  for (int out = 0; out < kOut; out += kLanes) {
    if constexpr (kIn % kLanes == 0) {
      TransformSquare<kInputs, 3, TransformFilterBack>(
          [=](int i, int j) { return sum(kInputs * i + j, out); },
          [=](int i, int j, Vector value) { write(3 * i + j, out, value); });
    } else {
      for (int row = 0; row < 9; ++row) write(row, out, sum(row, out));
    }
  }
}

// With fewer channels than a vector has, pixels are convolved one by one, on a
// picture with zeros around it.

int64_t PaddedWidth(int64_t width) {
  return (width + kPixels - 1) / kPixels * kPixels + 2;
}

template <int kIn>
int64_t PaddedSize(const Pictures& picture) {
  if (kIn % kLanes == 0) return 0;
  return (picture.height + 2) * PaddedWidth(picture.width) * kIn;
}

// Fills in a picture. Bytes become 255ths; with bfloat16, numbers of the result
// have half of the size of floats.
template <int kIn, bool kBfloat16>
void Pad(const Pictures& picture, const uint8_t* input, float* padded) {
  using Number = Number<kBfloat16>;
  const auto convert = [](const void* bytes, Number* to) {
    const Integers integers = __builtin_convertvector(
        *reinterpret_cast<const UnalignedBytes*>(bytes), Integers);
    Store(to, __builtin_convertvector(integers, Vector) * (1.f / 255));
  };
  const int64_t line = PaddedWidth(picture.width) * kIn;
  const int64_t size = picture.width * kIn;
  for (int64_t y = 0; y < picture.height; ++y, input += size) {
    Number* to = reinterpret_cast<Number*>(padded) + (y + 1) * line + kIn;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) convert(input + i, to + i);
    uint8_t rest[kLanes] = {};
    Number numbers[kLanes];
    memcpy(rest, input + i, size - i);
    convert(rest, numbers);
    memcpy(to + i, numbers, (size - i) * sizeof(Number));
  }
}

// Convolves a line.
template <int kIn, int kOut, bool kBfloat16>
void ConvolvePadded(const Pictures& picture, const float* padded,
                    const float* filter, const float* bias, int64_t y,
                    float* output) {
  using Number = Number<kBfloat16>;
  constexpr int kVectors = kOut / kLanes;
  constexpr int kStep = kBfloat16 ? 2 : 1;
  const int64_t line = PaddedWidth(picture.width) * kIn;
  for (int64_t x = 0; x < picture.width; x += kPixels) {
    Vector sums[kPixels][kVectors];
    for (int p = 0; p < kPixels; ++p) {
      for (int k = 0; k < kVectors; ++k) sums[p][k] = Load(bias + k * kLanes);
    }
    const float* weights = filter;
    for (int i = 0; i < 3; ++i) {
      // The three pixels' channels are side by side.
      const Number* first =
          reinterpret_cast<const Number*>(padded) + (y + i) * line + x * kIn;
      for (int in = 0; in < 3 * kIn; in += kStep, weights += kOut) {
        for (int p = 0; p < kPixels; ++p) {
          const float factor =
              *reinterpret_cast<const UnalignedFloat*>(first + p * kIn + in);
          for (int k = 0; k < kVectors; ++k) {
            sums[p][k] = AddProduct<kBfloat16>(sums[p][k], factor,
                                               Load(weights + k * kLanes));
          }
        }
      }
    }
    const int64_t count = std::min<int64_t>(kPixels, picture.width - x);
    for (int p = 0; p < kPixels; ++p) {
      if (p >= count) break;
      for (int k = 0; k < kVectors; ++k) {
        Store(output + (x + p) * kOut + k * kLanes, sums[p][k]);
      }
    }
  }
}

// Adds what a line contributes to the gradients of the filter, [9 * kIn, kOut],
// and, behind it, of the bias.
template <int kIn, int kOut>
void PaddedGradients(const Pictures& picture, const float* gradient,
                     const float* padded, int64_t y, float* sums) {
  const int64_t line = PaddedWidth(picture.width) * kIn;
  for (int out = 0; out < kOut; out += kLanes) {
    for (int i = 0; i < 3; ++i) {
      const float* first = padded + (y + i) * line;
      float* filter = sums + 3 * i * kIn * kOut + out;
      Vector sum[3 * kIn];
      for (int in = 0; in < 3 * kIn; ++in) sum[in] = Load(filter + in * kOut);
      for (int64_t x = 0; x < picture.width; ++x) {
        const Vector value = Load(gradient + x * kOut + out);
        for (int in = 0; in < 3 * kIn; ++in) {
          sum[in] += first[x * kIn + in] * value;
        }
      }
      for (int in = 0; in < 3 * kIn; ++in) Store(filter + in * kOut, sum[in]);
    }
    float* bias = sums + 9 * kIn * kOut + out;
    Vector sum = Load(bias);
    for (int64_t x = 0; x < picture.width; ++x) {
      sum += Load(gradient + x * kOut + out);
    }
    Store(bias, sum);
  }
}

// Maxima of 3x3 pixels around every second one of every second line. As
// elsewhere in TensorFlow, an odd pixel of padding is at the end.
struct Pool {
  explicit Pool(int64_t size)
      : outputs((size + 1) / 2), before(size % 2 == 0 ? 0 : 1) {}

  int64_t outputs;
  int64_t before;
};

// Pools a picture of which line(y) gives a line; it is called for one line
// after the other, and more than once, with those of the last window still
// valid.
template <int kChannels, typename Line>
void PoolPicture(const Pictures& picture, const Line& line, float* output,
                 float* copy, uint8_t* places) {
  const Pool rows(picture.height), columns(picture.width);
  int64_t at = 0;
  for (int64_t y = 0; y < rows.outputs; ++y) {
    const int64_t top = 2 * y - rows.before;
    const float* lines[3];
    for (int i = 0; i < 3; ++i) {
      const bool inside = top + i >= 0 && top + i < picture.height;
      lines[i] = inside ? line(top + i) : nullptr;
    }
    for (int64_t x = 0; x < columns.outputs; ++x) {
      const int64_t left = 2 * x - columns.before;
      const bool inside = lines[0] != nullptr && lines[2] != nullptr &&
                          left >= 0 && left + 3 <= picture.width;
      for (int c = 0; c < kChannels; c += kLanes, at += kLanes) {
        Vector largest = Vector{} - std::numeric_limits<float>::infinity();
        __m128i place = _mm_set1_epi8(4);  // Always inside.
        const auto visit = [&](int i, int j) {
          // Of equal ones the first. Where all are NaN, so is the result.
          const Vector value = Load(lines[i] + (left + j) * kChannels + c);
          const __mmask16 take =
              _mm512_cmp_ps_mask(value, largest, _CMP_NLE_UQ);
          largest = _mm512_mask_mov_ps(largest, take, value);
          place = _mm_mask_mov_epi8(place, take, _mm_set1_epi8(3 * i + j));
        };
        for (int i = 0; i < 3; ++i) {
          for (int j = 0; j < 3; ++j) {
            if (inside || (lines[i] != nullptr && left + j >= 0 &&
                           left + j < picture.width)) {
              visit(i, j);
            }
          }
        }
        Store(output + at, largest);
        if (copy != nullptr) Stream(copy + at, largest);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(places + at), place);
      }
    }
  }
}

// A line of windows that a line of pixels is in, and which line of theirs.
struct WindowLine {
  const float* gradient;
  const uint8_t* places;
  int line;
};

// The gradient of a line of a pool's input, in one line of windows or two.
template <int kChannels, int kLines>
void PoolGradient(const Pictures& picture, const WindowLine (&lines)[2],
                  float* output) {
  const Pool columns(picture.width);
  const auto add = [](const WindowLine& line, int64_t at, int column,
                      Vector* sum) {
    const __mmask16 mask = _mm_cmpeq_epi8_mask(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(line.places + at)),
        _mm_set1_epi8(3 * line.line + column));
    *sum = _mm512_mask_add_ps(*sum, mask, *sum, Load(line.gradient + at));
  };
  for (int64_t x = 0; x < columns.outputs; ++x) {
    const int64_t left = 2 * x - columns.before;
    for (int c = 0; c < kChannels; c += kLanes) {
      const int64_t at = x * kChannels + c;
      Vector first = {}, second = {};
      for (int i = 0; i < kLines; ++i) {
        add(lines[i], at, 0, &first);
        add(lines[i], at, 1, &second);
        if (x > 0) add(lines[i], at - kChannels, 2, &first);
      }
      if (left >= 0) Store(output + left * kChannels + c, first);
      if (left + 1 < picture.width) {
        Store(output + (left + 1) * kChannels + c, second);
      }
    }
  }
}

// The same for line `y` of a picture.
template <int kChannels>
void PoolGradient(const Pictures& picture, const float* gradient,
                  const uint8_t* places, int64_t y, float* output) {
  const Pool rows(picture.height);
  const int64_t size = Pool(picture.width).outputs * kChannels;
  WindowLine lines[2];
  int count = 0;
  // Windows begin at every second line.
  for (int64_t row = (y + rows.before) / 2; row >= 0; --row) {
    const int64_t line = y - (2 * row - rows.before);
    if (line > 2) break;
    if (row < rows.outputs) {
      lines[count++] = {gradient + row * size, places + row * size,
                        static_cast<int>(line)};
    }
  }
  if (count == 2) {
    PoolGradient<kChannels, 2>(picture, lines, output);
  } else {
    PoolGradient<kChannels, 1>(picture, lines, output);
  }
}

// Uninitialized memory for vectors. There may be none left.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(
                  aligned_alloc(64, (size * sizeof(float) / 64 + 1) * 64)),
              &free) {}

  explicit operator bool() const { return data_ != nullptr; }
  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float, decltype(&free)> data_;
};

// A convolution, a pool and then pairs of convolutions, of ReLUs, which with
// what comes before them added are residual blocks.
struct Section {
  Pictures pictures;
  int num_convolutions;
  const void* frames;    // [images, height, width, kIn], see `TorsoSection`.
  const float* filters;  // Prepared, one behind the other.

  Pictures picture() const { return {1, pictures.height, pictures.width}; }
  // So many after the pool.
  Pictures pooled(int64_t images) const {
    return {images, Pool(pictures.height).outputs,
            Pool(pictures.width).outputs};
  }
  // A picture as it comes in.
  template <typename Number>
  const Number* frame(int64_t image, int channels) const {
    return static_cast<const Number*>(frames) +
           image * pictures.pixels() * channels;
  }
  // Pictures of so many channels that go through it together.
  int64_t step(int channels) const {
    const int64_t bytes = pooled(1).pixels() * channels * sizeof(float);
    return std::max<int64_t>(1, kCached / std::max<int64_t>(1, bytes));
  }
};

// Of prepared filters and of sums for their gradients, with the biases': where
// those of a convolution begin.
template <int kIn, int kOut>
int64_t Place(int convolution, int extra_rows) {
  if (convolution == 0) return 0;
  const int first = Rows<kIn>() + extra_rows, other = Rows<kOut>() + extra_rows;
  return (first + int64_t{convolution - 1} * other) * kOut;
}

// Sends pictures `begin` to `end` through it. What comes out of each
// convolution, or the pool, goes to `activations`, and which pixels it took to
// `places`; null for what nobody needs. Returns whether the memory sufficed.
template <int kIn, int kOut, bool kBfloat16>
bool Compute(const Section& section, const std::vector<const float*>& biases,
             int64_t begin, int64_t end, const std::vector<float*>& activations,
             uint8_t* places) {
  const Pictures picture = section.picture();
  const int64_t pooled = section.pooled(1).pixels() * kOut;
  const int64_t step = section.step(kOut);
  const bool stream =
      section.pictures.images * pooled * sizeof(float) >= kStreamed;
  // All lines, or those of a window.
  const int64_t lines = kIn % kLanes == 0 ? picture.height : 3;
  const Buffer convolved(lines * picture.width * kOut);
  const auto line = [&](int64_t y) {
    return convolved.get() + y % lines * picture.width * kOut;
  };
  const Buffer padded(PaddedSize<kIn>(picture));
  // Of the last three, as a block's input is added to its output.
  const Buffer buffers[3] = {Buffer(step * pooled), Buffer(step * pooled),
                             Buffer(step * pooled)};
  const Buffer unneeded(places == nullptr ? pooled / sizeof(float) : 0);
  if (!convolved || !padded || !buffers[0] || !buffers[1] || !buffers[2] ||
      !unneeded) {
    return false;
  }
  memset(padded.get(), 0, PaddedSize<kIn>(picture) * sizeof(float));
  for (; begin < end; begin += step) {
    const int64_t count = std::min(step, end - begin);
    const int64_t first = begin * pooled;
    const auto output = [&](int c) {
      return activations[c] == nullptr || stream ? buffers[c % 3].get()
                                                 : activations[c] + first;
    };
    const auto copy = [&](int c) {
      return activations[c] != nullptr && stream ? activations[c] + first
                                                 : nullptr;
    };
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kIn % kLanes == 0) {
        Convolve<kIn, kOut, false, kBfloat16>(
            picture, section.frame<float>(begin + i, kIn), section.filters,
            {biases[0]}, convolved.get());
      } else {
        Pad<kIn, kBfloat16>(picture, section.frame<uint8_t>(begin + i, kIn),
                            padded.get());
      }
      [[maybe_unused]] int64_t next = 0;
      const auto convolved_line = [&](int64_t y) {
        if constexpr (kIn % kLanes != 0) {
          if (y < next) return line(y);
          ConvolvePadded<kIn, kOut, kBfloat16>(
              picture, padded.get(), section.filters, biases[0], y, line(y));
          ++next;
        }
        return line(y);
      };
      PoolPicture<kOut>(picture, convolved_line, output(0) + i * pooled,
                        copy(0) == nullptr ? nullptr : copy(0) + i * pooled,
                        places == nullptr
                            ? reinterpret_cast<uint8_t*>(unneeded.get())
                            : places + first + i * pooled);
    }
    for (int c = 1; c < section.num_convolutions; ++c) {
      const float* residual = c % 2 == 0 ? output(c - 2) : nullptr;
      Convolve<kOut, kOut, true, kBfloat16>(
          section.pooled(count), output(c - 1),
          section.filters + Place<kIn, kOut>(c, 0),
          {biases[c], nullptr, residual, copy(c)}, output(c));
    }
  }
  _mm_sfence();  // After what was written past the caches.
  return true;
}

// Given the gradient of what came out, adds what pictures `begin` to `end`
// contribute to the gradients of all filters, transformed, and biases, and
// computes the gradient of the frames, unless they have few channels. Filters
// are prepared from those turned around. Returns whether the memory sufficed.
template <int kIn, int kOut, bool kBfloat16>
bool Differentiate(const Section& section,
                   const std::vector<const float*>& activations,
                   const uint8_t* places, const float* gradient, int64_t begin,
                   int64_t end, float* frames_gradient, float* sums) {
  const Pictures picture = section.picture();
  const int64_t pooled = section.pooled(1).pixels() * kOut;
  const int64_t step = section.step(kOut);
  const Buffer before(step * pooled), between(step * pooled);
  const int64_t line = picture.width * kOut;
  const Buffer convolved(kIn % kLanes == 0 ? picture.height * line : line);
  const Buffer padded(PaddedSize<kIn>(picture));
  if (!before || !between || !convolved || !padded) return false;
  memset(padded.get(), 0, PaddedSize<kIn>(picture) * sizeof(float));
  for (; begin < end; begin += step) {
    const int64_t count = std::min(step, end - begin);
    const int64_t first = begin * pooled;
    const auto convolution = [&](int c, const float* from,
                                 const float* residual, float* to) {
      const float* input = activations[c - 1] + first;
      Gradients<kOut, kOut, true, kBfloat16>(
          section.pooled(count), from, input,
          section.filters + Place<kIn, kOut>(c, 0), {nullptr, input, residual},
          to, sums + Place<kIn, kOut>(c, 1));
    };
    const float* after = gradient + first;
    for (int c = section.num_convolutions - 1; c > 0; c -= 2) {
      convolution(c, after, nullptr, between.get());
      convolution(c - 1, between.get(), after, before.get());
      after = before.get();
    }
    for (int64_t i = begin; i < begin + count; ++i) {
      const auto pool_gradient = [&](int64_t y, float* to) {
        PoolGradient<kOut>(picture, after + (i - begin) * pooled,
                           places + i * pooled, y, to);
      };
      if constexpr (kIn % kLanes == 0) {
        for (int64_t y = 0; y < picture.height; ++y) {
          pool_gradient(y, convolved.get() + y * line);
        }
        Gradients<kIn, kOut, false, kBfloat16>(
            picture, convolved.get(), section.frame<float>(i, kIn),
            section.filters, {}, frames_gradient + i * picture.pixels() * kIn,
            sums);
      } else {
        Pad<kIn, false>(picture, section.frame<uint8_t>(i, kIn), padded.get());
        for (int64_t y = 0; y < picture.height; ++y) {
          pool_gradient(y, convolved.get());
          PaddedGradients<kIn, kOut>(picture, convolved.get(), padded.get(), y,
                                     sums);
        }
      }
    }
  }
  return true;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

using tensorflow::OpInputList;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;
namespace errors = tensorflow::errors;

bool Supported(bool bfloat16) {
  return __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") &&
         (!bfloat16 || (kHasBfloat16 && ImpalaHasBfloat16()));
}

// The functions for some numbers of channels.
struct Functions {
  using ForFilter = void (*[2])(const float* filter, float* prepared);

  int in;
  int out;
  int rows;           // Of a first prepared filter.
  ForFilter prepare;  // [bfloat16], here and below.
  ForFilter prepare_turned;
  decltype(&Compute<16, 16, false>) compute[2];
  decltype(&Differentiate<16, 16, false>) differentiate[2];
  decltype(&FinishGradient<16, 16>) finish_gradient;
};

template <int kIn, int kOut>
constexpr Functions For() {
  return {
      kIn,
      kOut,
      Rows<kIn>(),
      {Prepare<kIn, kOut, false>, Prepare<kIn, kOut, kHasBfloat16>},
      {PrepareTurned<kIn, kOut, false>, PrepareTurned<kIn, kOut, kHasBfloat16>},
      {Compute<kIn, kOut, false>, Compute<kIn, kOut, kHasBfloat16>},
      {Differentiate<kIn, kOut, false>, Differentiate<kIn, kOut, kHasBfloat16>},
      FinishGradient<kIn, kOut>};
}

// Those of the network's sections. Pictures have 1, 3 or 4 channels.
constexpr Functions kFunctions[] = {For<1, 16>(),  For<3, 16>(),
                                    For<4, 16>(),  For<16, 16>(),
                                    For<16, 32>(), For<32, 32>()};

// Finds them; null if there are none.
const Functions* Find(int64_t in, int64_t out) {
  for (const Functions& candidate : kFunctions) {
    if (candidate.in == in && candidate.out == out) return &candidate;
  }
  return nullptr;
}

absl::Status CheckShape(const Tensor& tensor, const TensorShape& shape) {
  if (tensor.shape() == shape) return absl::OkStatus();
  return errors::InvalidArgument("Expected ", shape.DebugString(), ", not ",
                                 tensor.shape().DebugString());
}

// Checks frames and filters; sets the functions for the first convolution.
absl::Status Check(const Tensor& frames, const OpInputList& filters,
                   const Functions** functions) {
  const Tensor& filter = filters[0];
  *functions = filter.dims() == 4 ? Find(filter.dim_size(2), filter.dim_size(3))
                                  : nullptr;
  if (*functions == nullptr || filter.dim_size(0) != 3 ||
      filter.dim_size(1) != 3) {
    return errors::InvalidArgument(
        "A filter is [3, 3, in, out], of 1, 3, 4 or 16 channels to 16, or of "
        "16 or 32 to 32; not ",
        filter.shape().DebugString());
  }
  const int in = (*functions)->in, out = (*functions)->out;
  for (int i = 1; i < filters.size(); ++i) {
    TF_RETURN_IF_ERROR(CheckShape(filters[i], {3, 3, out, out}));
  }
  if (filters.size() % 2 == 0) {
    return errors::InvalidArgument(
        "After the first convolution they are pairs; not ", filters.size(),
        " in all.");
  }
  const auto dtype = in < kLanes ? tensorflow::DT_UINT8 : tensorflow::DT_FLOAT;
  if (frames.dims() != 4 || frames.dim_size(3) != in ||
      frames.dtype() != dtype) {
    return errors::InvalidArgument("Expected frames of ", in, " channels as ",
                                   tensorflow::DataTypeString(dtype), ", not ",
                                   frames.shape().DebugString(), " as ",
                                   tensorflow::DataTypeString(frames.dtype()));
  }
  return absl::OkStatus();
}

// The shape of all activations.
TensorShape Pooled(const Tensor& frames, int channels) {
  return {frames.dim_size(0), Pool(frames.dim_size(1)).outputs,
          Pool(frames.dim_size(2)).outputs, channels};
}

// About as many processor cycles as a picture takes.
int64_t Cycles(const Section& section, const Functions& functions) {
  const int64_t pixels = section.pictures.pixels() * functions.in +
                         (section.num_convolutions - 1) *
                             section.pooled(1).pixels() * functions.out;
  return pixels * 9 * functions.out / kLanes / 2;
}

// Calls work(begin, end) for parts of 0 to `total`, in TensorFlow's threads. It
// returns whether the memory sufficed.
template <typename Work>
absl::Status Divide(OpKernelContext* context, int64_t total, int64_t cycles,
                    const Work& work) {
  std::atomic<bool> sufficed = true;
  const auto& threads = *context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(threads.num_threads, threads.workers, total, cycles,
                    [&](int64_t begin, int64_t end) {
                      if (!work(begin, end)) sufficed = false;
                    });
  if (sufficed) return absl::OkStatus();
  return errors::ResourceExhausted("No memory is left for a convolution.");
}

float* Floats(Tensor* tensor) { return tensor->flat<float>().data(); }

const float* Floats(const Tensor& tensor) {
  return tensor.flat<float>().data();
}

std::vector<const float*> Floats(const OpInputList& tensors) {
  std::vector<const float*> floats;
  for (const Tensor& tensor : tensors) floats.push_back(Floats(tensor));
  return floats;
}

// Allocates [rows, channels] for all filters or, with an extra row for the
// bias, for one set of sums for all gradients, `sets` times.
absl::Status Allocate(OpKernelContext* context, const Functions& functions,
                      int num_convolutions, int extra_rows, int64_t sets,
                      Tensor* tensor) {
  const int64_t rows =
      functions.rows + extra_rows +
      (num_convolutions - 1) * (kProducts * functions.out + extra_rows);
  return context->allocate_temp(tensorflow::DT_FLOAT,
                                {sets, rows * functions.out}, tensor);
}

class Kernel : public OpKernel {
 public:
  explicit Kernel(OpKernelConstruction* context) : OpKernel(context) {
    tensorflow::DataType precision;
    OP_REQUIRES_OK(context, context->GetAttr("precision", &precision));
    bfloat16_ = precision == tensorflow::DT_BFLOAT16;
    OP_REQUIRES(context, Supported(bfloat16_),
                errors::Unimplemented("This processor has no AVX-512",
                                      bfloat16_ ? " for bfloat16." : "."));
  }

 protected:
  struct Inputs {
    const Functions* functions;  // For the first convolution.
    Tensor prepared;             // All filters.
    Section section;
  };

  // Checks frames and filters, and prepares these in one of the two ways.
  absl::Status PrepareInputs(OpKernelContext* context, const Tensor& frames,
                             const OpInputList& filters,
                             Functions::ForFilter Functions::* prepare,
                             Inputs* inputs) const {
    const Functions* functions;
    TF_RETURN_IF_ERROR(Check(frames, filters, &functions));
    inputs->functions = functions;
    TF_RETURN_IF_ERROR(
        Allocate(context, *functions, filters.size(), 0, 1, &inputs->prepared));
    inputs->section = {
        {frames.dim_size(0), frames.dim_size(1), frames.dim_size(2)},
        filters.size(),
        frames.data(),
        Floats(inputs->prepared)};
    float* place = Floats(&inputs->prepared);
    for (const Tensor& filter : filters) {
      (functions->*prepare)[bfloat16_](Floats(filter), place);
      place += functions->rows * functions->out;
      functions = Find(functions->out, functions->out);
    }
    return absl::OkStatus();
  }

  bool bfloat16_;
};

class TorsoSection : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& frames = context->input(0);
    OpInputList filters, biases;
    OP_REQUIRES_OK(context, context->input_list("filters", &filters));
    OP_REQUIRES_OK(context, context->input_list("biases", &biases));
    Inputs inputs;
    OP_REQUIRES_OK(context, PrepareInputs(context, frames, filters,
                                          &Functions::prepare, &inputs));
    const Functions* functions = inputs.functions;
    const Section& section = inputs.section;
    const int out = functions->out, num_convolutions = filters.size();
    for (const Tensor& bias : biases) {
      OP_REQUIRES_OK(context, CheckShape(bias, {out}));
    }
    // To act, none but the last is needed.
    std::vector<float*> activations(num_convolutions);
    uint8_t* places = nullptr;
    const TensorShape shape = Pooled(frames, out);
    for (int i = 0; i <= num_convolutions; ++i) {
      if (!context->output_required(i)) continue;
      Tensor* output;
      OP_REQUIRES_OK(context, context->allocate_output(i, shape, &output));
      if (i < num_convolutions) {
        activations[i] = Floats(output);
      } else {
        places = output->flat<uint8_t>().data();
      }
    }
    OP_REQUIRES_OK(
        context,
        Divide(context, frames.dim_size(0), Cycles(section, *functions),
               [&](int64_t begin, int64_t end) {
                 return functions->compute[bfloat16_](
                     section, Floats(biases), begin, end, activations, places);
               }));
  }
};

class TorsoSectionGradient : public Kernel {
 public:
  using Kernel::Kernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& gradient = context->input(0);
    const Tensor& frames = context->input(1);
    OpInputList filters, activations;
    OP_REQUIRES_OK(context, context->input_list("filters", &filters));
    OP_REQUIRES_OK(context, context->input_list("activations", &activations));
    const Tensor& places = context->input(context->num_inputs() - 1);
    Inputs inputs;
    OP_REQUIRES_OK(context, PrepareInputs(context, frames, filters,
                                          &Functions::prepare_turned, &inputs));
    const Functions* functions = inputs.functions;
    const Section& section = inputs.section;
    const int num_convolutions = filters.size();
    const TensorShape shape = Pooled(frames, functions->out);
    OP_REQUIRES_OK(context, CheckShape(gradient, shape));
    OP_REQUIRES_OK(context, CheckShape(places, shape));
    for (const Tensor& activation : activations) {
      OP_REQUIRES_OK(context, CheckShape(activation, shape));
    }
    const bool of_frames = functions->in % kLanes == 0;
    OP_REQUIRES(
        context, context->num_outputs() == 2 * num_convolutions + of_frames,
        errors::InvalidArgument("Frames of ", functions->in, " channels have ",
                                of_frames ? 1 : 0, " gradients."));
    float* frames_gradient = nullptr;
    if (of_frames) {
      Tensor* output;
      OP_REQUIRES_OK(context,
                     context->allocate_output(2 * num_convolutions,
                                              frames.shape(), &output));
      frames_gradient = Floats(output);
    }
    const int64_t images = frames.dim_size(0);
    const int64_t chunk =
        std::max(kChunkImages, (images + kChunks - 1) / kChunks);
    const int64_t chunks = std::max<int64_t>(1, (images + chunk - 1) / chunk);
    Tensor sums;
    OP_REQUIRES_OK(context, Allocate(context, *functions, num_convolutions, 1,
                                     chunks, &sums));
    const int64_t size = sums.dim_size(1);
    const auto differentiate = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float* sum = Floats(&sums) + c * size;
        memset(sum, 0, size * sizeof(float));
        if (!functions->differentiate[bfloat16_](
                section, Floats(activations), places.flat<uint8_t>().data(),
                Floats(gradient), c * chunk, std::min((c + 1) * chunk, images),
                frames_gradient, sum)) {
          return false;
        }
      }
      return true;
    };
    OP_REQUIRES_OK(context, Divide(context, chunks,
                                   3 * chunk * Cycles(section, *functions),
                                   differentiate));
    Finish(context, *functions, num_convolutions, sums);
  }

 private:
  // Adds up the sums of chunks, for two outputs per convolution.
  static void Finish(OpKernelContext* context, const Functions& first,
                     int num_convolutions, const Tensor& sums) {
    const int64_t chunks = sums.dim_size(0), size = sums.dim_size(1);
    const int out = first.out;
    const float* sum = Floats(sums);
    const Functions* functions = &first;
    for (int i = 0; i < num_convolutions; ++i) {
      const int in = functions->in, rows = functions->rows;
      Tensor *filter, *bias;
      OP_REQUIRES_OK(context,
                     context->allocate_output(i, {3, 3, in, out}, &filter));
      OP_REQUIRES_OK(context, context->allocate_output(num_convolutions + i,
                                                       {out}, &bias));
      const auto finish = [&](int64_t begin, int64_t end) {
        for (int64_t channel = begin; channel < end; ++channel) {
          functions->finish_gradient(chunks, size, channel, sum,
                                     Floats(filter));
        }
        return true;
      };
      OP_REQUIRES_OK(
          context,
          Divide(context, in, chunks * rows / in * out / kLanes, finish));
      sum += rows * out;
      auto total = bias->flat<float>();
      total.setZero();
      for (int64_t c = 0; c < chunks; ++c) {
        for (int o = 0; o < out; ++o) total(o) += sum[c * size + o];
      }
      sum += out;
      functions = Find(out, out);
    }
  }
};

// [N, height, width, in] to [N, ceil(height / 2), ceil(width / 2), out].
absl::Status SectionShape(InferenceContext* context) {
  ShapeHandle frames, filter, output;
  DimensionHandle channels;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &frames));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &filter));
  TF_RETURN_IF_ERROR(context->Merge(context->Dim(frames, 3),
                                    context->Dim(filter, 2), &channels));
  TF_RETURN_IF_ERROR(
      context->ReplaceDim(frames, 3, context->Dim(filter, 3), &output));
  for (int i : {1, 2}) {
    DimensionHandle size;
    TF_RETURN_IF_ERROR(context->Add(context->Dim(output, i), 1, &size));
    TF_RETURN_IF_ERROR(context->Divide(size, 2, false, &size));
    TF_RETURN_IF_ERROR(context->ReplaceDim(output, i, size, &output));
  }
  for (int i = 0; i < context->num_outputs(); ++i) {
    context->set_output(i, output);
  }
  return absl::OkStatus();
}

absl::Status SectionGradientShape(InferenceContext* context) {
  int num_convolutions;
  TF_RETURN_IF_ERROR(context->GetAttr("num_convolutions", &num_convolutions));
  for (int i = 0; i < num_convolutions; ++i) {
    ShapeHandle filter;
    TF_RETURN_IF_ERROR(context->WithRank(context->input(2 + i), 4, &filter));
    context->set_output(i, filter);
    context->set_output(num_convolutions + i,
                        context->Vector(context->Dim(filter, 3)));
  }
  for (int i = 2 * num_convolutions; i < context->num_outputs(); ++i) {
    context->set_output(i, context->input(1));
  }
  return absl::OkStatus();
}

REGISTER_OP("TorsoSection")
    .Input("frames: T")
    .Input("filters: num_convolutions * float")
    .Input("biases: num_convolutions * float")
    .Output("activations: num_convolutions * float")
    .Output("places: uint8")
    .Attr("num_convolutions: int >= 1")
    .Attr("T: {uint8, float}")
    .Attr("precision: {float, bfloat16}")
    .SetShapeFn(SectionShape)
    .Doc(R"doc(
Convolves frames, [N, height, width, in], takes the maximum of 3x3 pixels with
stride 2, and sends it through residual blocks: a ReLU, a convolution, a ReLU and
another one, with what comes before them added. Convolutions are of 3x3 pixels,
with stride 1 and as much padding with zeros as keeps the size.

frames: of 16 or 32 channels, or of 1, 3 or 4, which are bytes and count as 255ths.
filters: [3, 3, in, out], and two of [3, 3, out, out] for each block.
precision: of the factors of products, but for the gradients of filters of less
  than 16 channels.
activations: what comes out of the pool and, for each block, of its first
  convolution and of the block. The last one is the section's output.
places: which of the nine pixels is the maximum.
)doc");

REGISTER_OP("TorsoSectionGradient")
    .Input("gradient: float")
    .Input("frames: T")
    .Input("filters: num_convolutions * float")
    .Input("activations: num_convolutions * float")
    .Input("places: uint8")
    .Output("filter_gradients: num_convolutions * float")
    .Output("bias_gradients: num_convolutions * float")
    .Output("frames_gradient: num_frames_gradients * float")
    .Attr("num_convolutions: int >= 1")
    .Attr("num_frames_gradients: int >= 0")
    .Attr("T: {uint8, float}")
    .Attr("precision: {float, bfloat16}")
    .SetShapeFn(SectionGradientShape)
    .Doc(R"doc(
The gradients of `TorsoSection`, given that of its output.

frames_gradient: one, or none if frames are bytes.
)doc");

REGISTER_KERNEL_BUILDER(Name("TorsoSection").Device(tensorflow::DEVICE_CPU),
                        TorsoSection);
REGISTER_KERNEL_BUILDER(
    Name("TorsoSectionGradient").Device(tensorflow::DEVICE_CPU),
    TorsoSectionGradient);

}  // namespace
}  // namespace impala

extern "C" bool ImpalaConvolutionSupported(bool bfloat16) {
  return impala::Supported(bfloat16);
}

#else

extern "C" bool ImpalaConvolutionSupported(bool) { return false; }

#endif  // IMPALA_AVX512
