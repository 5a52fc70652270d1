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
//
// A convolution that a pool follows is computed with it, picture by picture, so
// that what is between both stays in the cache. There, and only there, pictures
// of 1, 3 or 4 channels are convolved pixel by pixel.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
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
constexpr int64_t kChunkImages = 4;                  // The same, before pools.
constexpr int64_t kStreamed = int64_t{4} << 20;      // Bytes; see `Store`.
constexpr int kPixels = 12;                          // Convolved at once.

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
// The same somewhere in memory.
typedef float Unaligned
    __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
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
};

// The only functions with instructions of AVX-512: no code that runs while the
// library is loaded may have them. Clang knows no such pragma.
#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f")
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
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
  alignas(64) float block[kProducts * kTiles * kStride];
  // A last block may be part of one, but is multiplied as a whole.
  if ((end - begin) % kTiles != 0) memset(block, 0, sizeof(block));
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

// How many vectors of outputs a prepared filter has, and with it its gradient.
template <int kIn>
constexpr int Rows() {
  return kIn % kLanes == 0 ? kProducts * kIn : 9 * kIn;
}

// Prepares a filter, [3, 3, kIn, kOut].
template <int kIn, int kOut>
void Prepare(const float* filter, float* prepared) {
  if constexpr (kIn % kLanes == 0) {
    TransformFilters<kIn, kOut>(filter, prepared);
  } else {
    memcpy(prepared, filter, Rows<kIn>() * kOut * sizeof(float));
  }
}

// Adds up the gradients of all chunks for one channel of the input, and undoes
// their transform.
template <int kIn, int kOut>
void FinishGradient(int64_t chunks, int in, const float* sums, float* filter) {
  const auto sum = [=](int row, int out) {
    const float* place = sums + (row * kIn + in) * kOut + out;
    Vector sum = {};
    for (int64_t c = 0; c < chunks; ++c) {
      sum += Load(place + c * (Rows<kIn>() + 1) * kOut);
    }
    return sum;
  };
  const auto write = [=](int row, int out, Vector value) {
    Store<false>(filter + (row * kIn + in) * kOut + out, value);
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

template <int kIn>
void Pad(const Pictures& picture, const float* input, float* padded) {
  const int64_t line = PaddedWidth(picture.width) * kIn;
  memset(padded, 0, PaddedSize<kIn>(picture) * sizeof(float));
  for (int64_t y = 0; y < picture.height; ++y) {
    memcpy(padded + (y + 1) * line + kIn, input + y * picture.width * kIn,
           picture.width * kIn * sizeof(float));
  }
}

template <int kIn, int kOut>
void ConvolvePadded(const Pictures& picture, const float* padded,
                    const float* filter, const float* bias, float* output) {
  constexpr int kVectors = kOut / kLanes;
  const int64_t line = PaddedWidth(picture.width) * kIn;
  for (int64_t y = 0; y < picture.height; ++y) {
    for (int64_t x = 0; x < picture.width; x += kPixels) {
      Vector sums[kPixels][kVectors];
      for (int p = 0; p < kPixels; ++p) {
        for (int k = 0; k < kVectors; ++k) {
          sums[p][k] = Load(bias + k * kLanes);
        }
      }
      const float* weights = filter;
      for (int i = 0; i < 3; ++i) {
        // The three pixels' channels are side by side.
        const float* first = padded + (y + i) * line + x * kIn;
        for (int in = 0; in < 3 * kIn; ++in, weights += kOut) {
          for (int p = 0; p < kPixels; ++p) {
            for (int k = 0; k < kVectors; ++k) {
              sums[p][k] += first[p * kIn + in] * Load(weights + k * kLanes);
            }
          }
        }
      }
      const int64_t count = std::min<int64_t>(kPixels, picture.width - x);
      float* place = output + (y * picture.width + x) * kOut;
      for (int p = 0; p < kPixels; ++p) {
        if (p >= count) break;
        for (int k = 0; k < kVectors; ++k) {
          Store<false>(place + p * kOut + k * kLanes, sums[p][k]);
        }
      }
    }
  }
}

// Adds to the gradients of the filter, [9 * kIn, kOut], and, behind it, of the
// bias.
template <int kIn, int kOut>
void PaddedGradients(const Pictures& picture, const float* gradient,
                     const float* padded, float* sums) {
  const int64_t line = PaddedWidth(picture.width) * kIn;
  for (int out = 0; out < kOut; out += kLanes, sums += kLanes) {
    Vector bias = {};
    for (int i = 0; i < 3; ++i) {
      Vector filter[3 * kIn] = {};
      for (int64_t y = 0; y < picture.height; ++y) {
        const float* first = padded + (y + i) * line;
        const float* place = gradient + y * picture.width * kOut + out;
        for (int64_t x = 0; x < picture.width; ++x) {
          const Vector value = Load(place + x * kOut);
          for (int in = 0; in < 3 * kIn; ++in) {
            filter[in] += first[x * kIn + in] * value;
          }
          if (i == 0) bias += value;
        }
      }
      for (int in = 0; in < 3 * kIn; ++in) {
        float* sum = sums + (3 * i * kIn + in) * kOut;
        Store<false>(sum, Load(sum) + filter[in]);
      }
    }
    Store<false>(sums + 9 * kIn * kOut, Load(sums + 9 * kIn * kOut) + bias);
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

int64_t PooledPixels(const Pictures& picture) {
  return Pool(picture.height).outputs * Pool(picture.width).outputs;
}

// For each window and vector of channels, calls begin(output), visit(place of
// 9, input) for what is inside of the picture, and end(output); outputs and
// inputs are offsets of numbers.
template <int kChannels, typename Begin, typename Visit, typename End>
inline void VisitWindows(const Pictures& picture, const Begin& begin,
                         const Visit& visit, const End& end) {
  const Pool rows(picture.height), columns(picture.width);
  for (int64_t y = 0; y < rows.outputs; ++y) {
    for (int64_t x = 0; x < columns.outputs; ++x) {
      const int64_t top = 2 * y - rows.before, left = 2 * x - columns.before;
      const bool inside = top >= 0 && left >= 0 && top + 3 <= picture.height &&
                          left + 3 <= picture.width;
      for (int channel = 0; channel < kChannels; channel += kLanes) {
        const int64_t first =
            (top * picture.width + left) * kChannels + channel;
        const int64_t output = (y * columns.outputs + x) * kChannels + channel;
        begin(output);
        if (inside) {
          for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) {
              visit(3 * i + j, first + (i * picture.width + j) * kChannels);
            }
          }
        } else {
          for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) {
              if (top + i >= 0 && top + i < picture.height && left + j >= 0 &&
                  left + j < picture.width) {
                visit(3 * i + j, first + (i * picture.width + j) * kChannels);
              }
            }
          }
        }
        end(output);
      }
    }
  }
}

template <int kChannels>
void PoolPicture(const Pictures& picture, const float* input, float* output,
                 uint8_t* places) {
  Vector largest;
  Integers place;
  VisitWindows<kChannels>(
      picture,
      [&](int64_t) {
        largest = Vector{} - std::numeric_limits<float>::infinity();
        place = Integers{} + 4;  // Always inside.
      },
      [&](int number, int64_t at) {
        // Of equal ones the first. Where all are NaN, so is the result.
        const Vector value = Load(input + at);
        const Integers keep = value <= largest;
        largest = keep ? largest : value;
        place = keep ? place : Integers{} + number;
      },
      [&](int64_t at) {
        Store<false>(output + at, largest);
        *reinterpret_cast<UnalignedBytes*>(places + at) =
            __builtin_convertvector(place, Bytes);
      });
}

template <int kChannels>
void PoolGradient(const Pictures& picture, const float* gradient,
                  const uint8_t* places, float* input_gradient) {
  memset(input_gradient, 0, picture.pixels() * kChannels * sizeof(float));
  Vector value;
  Integers place;
  VisitWindows<kChannels>(
      picture,
      [&](int64_t at) {
        value = Load(gradient + at);
        place = __builtin_convertvector(
            *reinterpret_cast<const UnalignedBytes*>(places + at), Integers);
      },
      [&](int number, int64_t at) {
        float* sum = input_gradient + at;
        Store<false>(sum, Load(sum) + (place == number ? value : Vector{}));
      },
      [](int64_t) {});
}

// Uninitialized memory for vectors.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(
                  aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64)),
              &free) {
    if (data_ == nullptr) {
      fputs("No memory left for a convolution.\n", stderr);
      abort();
    }
  }

  float* get() const { return data_.get(); }

 private:
  std::unique_ptr<float, decltype(&free)> data_;
};

// Convolves and pools pictures `begin` to `end`.
template <int kIn, int kOut>
void ConvolveAndPool(const Pictures& pictures, const float* input,
                     const float* filter, const float* bias, int64_t begin,
                     int64_t end, float* output, uint8_t* places) {
  const Pictures picture = {1, pictures.height, pictures.width};
  const int64_t pooled = PooledPixels(picture) * kOut;
  const Buffer convolved(picture.pixels() * kOut);
  const Buffer padded(PaddedSize<kIn>(picture));
  for (; begin < end; ++begin) {
    const float* image = input + begin * picture.pixels() * kIn;
    if constexpr (kIn % kLanes == 0) {
      Convolve<kIn, kOut, false, false>(picture, image, filter, {bias}, 0,
                                        picture.tiles(), convolved.get());
    } else {
      Pad<kIn>(picture, image, padded.get());
      ConvolvePadded<kIn, kOut>(picture, padded.get(), filter, bias,
                                convolved.get());
    }
    PoolPicture<kOut>(picture, convolved.get(), output + begin * pooled,
                      places + begin * pooled);
  }
}

// As `Gradients`, for pictures `begin` to `end`, given the gradient of what
// came out of the pool. That of an input with few channels isn't computed.
template <int kIn, int kOut>
void PooledGradients(const Pictures& pictures, const float* gradient,
                     const uint8_t* places, const float* input,
                     const float* filter, int64_t begin, int64_t end,
                     float* input_gradient, float* sums) {
  const Pictures picture = {1, pictures.height, pictures.width};
  const int64_t pooled = PooledPixels(picture) * kOut;
  const int64_t size = picture.pixels() * kIn;
  const Buffer convolved(picture.pixels() * kOut);
  const Buffer padded(PaddedSize<kIn>(picture));
  for (; begin < end; ++begin) {
    PoolGradient<kOut>(picture, gradient + begin * pooled,
                       places + begin * pooled, convolved.get());
    if constexpr (kIn % kLanes == 0) {
      Gradients<kIn, kOut, false, false>(
          picture, convolved.get(), input + begin * size, filter, {}, 0,
          picture.tiles(), input_gradient + begin * size, sums);
    } else {
      Pad<kIn>(picture, input + begin * size, padded.get());
      PaddedGradients<kIn, kOut>(picture, convolved.get(), padded.get(), sums);
    }
  }
}

#if defined(__x86_64__) && !defined(__clang__)
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
  return kCompiled && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

// The functions for some numbers of channels.
struct Functions {
  int in;
  int out;
  int rows;  // Of a prepared filter.
  decltype(&Prepare<16, 16>) prepare;
  decltype(&Convolve<16, 16, false, false>) convolve[2][2];  // [relu][stream]
  decltype(&Gradients<16, 16, false, false>) gradients[2][2];
  decltype(&ConvolveAndPool<16, 16>) convolve_and_pool;
  decltype(&PooledGradients<16, 16>) pooled_gradients;
  decltype(&FinishGradient<16, 16>) finish_gradient;
};

template <int kIn, int kOut>
constexpr Functions For() {
  Functions functions = {kIn, kOut, Rows<kIn>(), Prepare<kIn, kOut>};
  if constexpr (kIn % kLanes == 0) {
    functions.convolve[0][0] = Convolve<kIn, kOut, false, false>;
    functions.convolve[0][1] = Convolve<kIn, kOut, false, true>;
    functions.convolve[1][0] = Convolve<kIn, kOut, true, false>;
    functions.convolve[1][1] = Convolve<kIn, kOut, true, true>;
    functions.gradients[0][0] = Gradients<kIn, kOut, false, false>;
    functions.gradients[0][1] = Gradients<kIn, kOut, false, true>;
    functions.gradients[1][0] = Gradients<kIn, kOut, true, false>;
    functions.gradients[1][1] = Gradients<kIn, kOut, true, true>;
  }
  functions.convolve_and_pool = ConvolveAndPool<kIn, kOut>;
  functions.pooled_gradients = PooledGradients<kIn, kOut>;
  functions.finish_gradient = FinishGradient<kIn, kOut>;
  return functions;
}

// Pictures have 1, 3 or 4 channels.
constexpr Functions kFunctions[] = {
    For<1, 16>(), For<3, 16>(), For<4, 16>(), For<16, 16>(), For<32, 16>(),
    For<1, 32>(), For<3, 32>(), For<4, 32>(), For<16, 32>(), For<32, 32>()};

// Finds them for a filter, [3, 3, in, out].
absl::Status Find(const TensorShape& filter, bool pool,
                  const Functions** functions) {
  for (const Functions& candidate : kFunctions) {
    if (filter == TensorShape({3, 3, candidate.in, candidate.out}) &&
        (pool || candidate.convolve[0][0] != nullptr)) {
      *functions = &candidate;
      return absl::OkStatus();
    }
  }
  return errors::InvalidArgument(
      "A filter is [3, 3, in, out] with in and out 16 or 32, in also 1, 3 or 4 "
      "before a pool; not ",
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

Pictures PicturesOf(const Tensor& tensor) {
  return {tensor.dim_size(0), tensor.dim_size(1), tensor.dim_size(2)};
}

// Of a convolution of the input or, with kPool, of one and a pool.
template <bool kPool>
TensorShape OutputShape(const Tensor& input, int channels) {
  TensorShape shape = input.shape();
  shape.set_dim(3, channels);
  if (kPool) {
    shape.set_dim(1, Pool(shape.dim_size(1)).outputs);
    shape.set_dim(2, Pool(shape.dim_size(2)).outputs);
  }
  return shape;
}

// About as many processor cycles as the convolution of some pixels takes.
int64_t Cycles(const Functions& functions, int64_t pixels) {
  return pixels * 9 * functions.in * functions.out / kLanes / 2;
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
  }
};

absl::Status AllocateFloats(OpKernelContext* context, const TensorShape& shape,
                            Tensor* tensor) {
  return context->allocate_temp(tensorflow::DT_FLOAT, shape, tensor);
}

float* Floats(Tensor* tensor) { return tensor->flat<float>().data(); }

const float* Floats(const Tensor& tensor) {
  return tensor.flat<float>().data();
}

// What the functions take for a filter.
absl::Status PrepareFilter(OpKernelContext* context, const Functions& functions,
                           const Tensor& filter, Tensor* prepared) {
  TF_RETURN_IF_ERROR(
      AllocateFloats(context, {functions.rows, functions.out}, prepared));
  functions.prepare(Floats(filter), Floats(prepared));
  return absl::OkStatus();
}

// A convolution or, with kPool, one and a pool.
template <bool kPool>
class Convolution : public Kernel {
 public:
  explicit Convolution(OpKernelConstruction* context) : Kernel(context) {
    if (!kPool) OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& input = context->input(0);
    const Tensor& filter = context->input(1);
    const Tensor& bias = context->input(2);
    const Functions* functions;
    OP_REQUIRES_OK(context, Find(filter.shape(), kPool, &functions));
    OP_REQUIRES_OK(context, CheckPictures(input, functions->in));
    OP_REQUIRES_OK(context, CheckShape(bias, {functions->out}));
    OP_REQUIRES(context, context->num_inputs() <= 4,
                errors::InvalidArgument("More than one residual."));
    const TensorShape shape = OutputShape<kPool>(input, functions->out);
    Epilogue epilogue = {Floats(bias)};
    if (context->num_inputs() > 3) {
      const Tensor& residual = context->input(3);
      OP_REQUIRES_OK(context, CheckShape(residual, shape));
      epilogue.residual = Floats(residual);
    }
    Tensor prepared, *output, *places = nullptr;
    OP_REQUIRES_OK(context,
                   PrepareFilter(context, *functions, filter, &prepared));
    OP_REQUIRES_OK(context, context->allocate_output(0, shape, &output));
    const Pictures pictures = PicturesOf(input);
    if (kPool) {
      OP_REQUIRES_OK(context, context->allocate_output(1, shape, &places));
      Divide(context, pictures.images, Cycles(*functions, pictures.pixels()),
             [&](int64_t begin, int64_t end) {
               functions->convolve_and_pool(
                   pictures, Floats(input), Floats(prepared), Floats(bias),
                   begin, end, Floats(output), places->flat<uint8_t>().data());
             });
      return;
    }
    const int64_t tiles = pictures.tiles();
    const bool stream = output->TotalBytes() >= kStreamed;
    Divide(context, (tiles + kTiles - 1) / kTiles,
           Cycles(*functions, kTiles * kOutputs * kOutputs),
           [&](int64_t begin, int64_t end) {
             functions->convolve[relu_][stream](
                 pictures, Floats(input), Floats(prepared), epilogue,
                 begin * kTiles, std::min(end * kTiles, tiles), Floats(output));
           });
  }

 private:
  bool relu_ = false;
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

// The gradients of a convolution or, with kPool, of one and a pool.
template <bool kPool>
class Gradient : public Kernel {
 public:
  explicit Gradient(OpKernelConstruction* context) : Kernel(context) {
    if (!kPool) OP_REQUIRES_OK(context, context->GetAttr("relu", &relu_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& gradient = context->input(0);
    const Tensor& input = context->input(1);
    const Tensor& filter = context->input(2);
    const Functions* functions;
    OP_REQUIRES_OK(context, Find(filter.shape(), kPool, &functions));
    const int in = functions->in, out = functions->out;
    OP_REQUIRES_OK(context, CheckPictures(input, in));
    const TensorShape output = OutputShape<kPool>(input, out);
    OP_REQUIRES_OK(context, CheckShape(gradient, output));
    const uint8_t* places = nullptr;
    if (kPool) {
      OP_REQUIRES_OK(context, CheckShape(context->input(3), output));
      places = context->input(3).flat<uint8_t>().data();
    }
    Tensor prepared, *input_gradient = nullptr;
    OP_REQUIRES(context, context->num_outputs() == (in < kLanes ? 2 : 3),
                errors::InvalidArgument("Inputs of ", in, " channels have ",
                                        in >= kLanes ? 1 : 0, " gradients."));
    if (context->num_outputs() > 2) {
      OP_REQUIRES_OK(context, PrepareTurned(context, filter, &prepared));
      OP_REQUIRES_OK(
          context, context->allocate_output(2, input.shape(), &input_gradient));
    }
    Epilogue epilogue = {};
    if (relu_) epilogue.mask = Floats(input);
    const bool stream = input.TotalBytes() >= kStreamed;
    const Pictures pictures = PicturesOf(input);

    const int64_t total = kPool ? pictures.images : pictures.tiles();
    const int64_t chunk = kPool ? kChunkImages : kChunkTiles;
    const int64_t chunks = (total + chunk - 1) / chunk;
    const int64_t size = (functions->rows + 1) * out;
    Tensor sums;
    OP_REQUIRES_OK(context, AllocateFloats(context, {chunks, size}, &sums));
    const auto add = [&](int64_t begin, int64_t end, float* sums) {
      memset(sums, 0, size * sizeof(float));
      float* result = input_gradient ? Floats(input_gradient) : nullptr;
      if (kPool) {
        functions->pooled_gradients(pictures, Floats(gradient), places,
                                    Floats(input), Floats(prepared), begin, end,
                                    result, sums);
      } else {
        functions->gradients[relu_][stream](pictures, Floats(gradient),
                                            Floats(input), Floats(prepared),
                                            epilogue, begin, end, result, sums);
      }
    };
    const int64_t pixels = kPool ? pictures.pixels() : kOutputs * kOutputs;
    Divide(context, chunks, 2 * Cycles(*functions, chunk * pixels),
           [&](int64_t begin, int64_t end) {
             for (int64_t c = begin; c < end; ++c) {
               add(c * chunk, std::min((c + 1) * chunk, total),
                   Floats(&sums) + c * size);
             }
           });
    Finish(context, *functions, sums);
  }

 private:
  static absl::Status PrepareTurned(OpKernelContext* context,
                                    const Tensor& filter, Tensor* prepared) {
    const TensorShape shape({3, 3, filter.dim_size(3), filter.dim_size(2)});
    const Functions* functions;
    TF_RETURN_IF_ERROR(Find(shape, false, &functions));
    Tensor turned;
    TF_RETURN_IF_ERROR(AllocateFloats(context, shape, &turned));
    Turn(filter, &turned);
    return PrepareFilter(context, *functions, turned, prepared);
  }

  // Adds up the sums of chunks, [chunks, rows + 1, out], for two outputs.
  static void Finish(OpKernelContext* context, const Functions& functions,
                     const Tensor& sums) {
    const int in = functions.in, out = functions.out;
    const int64_t chunks = sums.dim_size(0);
    Tensor *filter, *bias;
    OP_REQUIRES_OK(context,
                   context->allocate_output(0, {3, 3, in, out}, &filter));
    OP_REQUIRES_OK(context, context->allocate_output(1, {out}, &bias));
    Divide(context, in, chunks * functions.rows / in * out / kLanes,
           [&](int64_t begin, int64_t end) {
             for (int64_t i = begin; i < end; ++i) {
               functions.finish_gradient(chunks, i, Floats(sums),
                                         Floats(filter));
             }
           });
    auto total = bias->flat<float>();
    total.setZero();
    for (int64_t c = 1; c <= chunks; ++c) {
      const float* last = Floats(sums) + (c * (functions.rows + 1) - 1) * out;
      for (int o = 0; o < out; ++o) total(o) += last[o];
    }
  }

  bool relu_ = false;
};

// [N, height, width, in], [3, 3, in, out] to [N, height, width, out].
absl::Status ConvolutionShape(InferenceContext* context) {
  ShapeHandle input, filter, bias, output;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(0), 4, &input));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(1), 4, &filter));
  TF_RETURN_IF_ERROR(context->WithRank(context->input(2), 1, &bias));
  DimensionHandle in, out;
  TF_RETURN_IF_ERROR(
      context->Merge(context->Dim(input, 3), context->Dim(filter, 2), &in));
  TF_RETURN_IF_ERROR(
      context->Merge(context->Dim(bias, 0), context->Dim(filter, 3), &out));
  TF_RETURN_IF_ERROR(context->ReplaceDim(input, 3, out, &output));
  for (int i = 3; i < context->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(context->Merge(context->input(i), output, &output));
  }
  context->set_output(0, output);
  return absl::OkStatus();
}

// The same with half of the height and width.
absl::Status PooledShape(InferenceContext* context) {
  TF_RETURN_IF_ERROR(ConvolutionShape(context));
  ShapeHandle output = context->output(0);
  for (int i : {1, 2}) {
    DimensionHandle size;
    TF_RETURN_IF_ERROR(context->Add(context->Dim(output, i), 1, &size));
    TF_RETURN_IF_ERROR(context->Divide(size, 2, false, &size));
    TF_RETURN_IF_ERROR(context->ReplaceDim(output, i, size, &output));
  }
  context->set_output(0, output);
  context->set_output(1, output);
  return absl::OkStatus();
}

// Of filter, bias and, perhaps, input.
absl::Status GradientShape(InferenceContext* context) {
  ShapeHandle filter;
  TF_RETURN_IF_ERROR(context->WithRank(context->input(2), 4, &filter));
  context->set_output(0, filter);
  context->set_output(1, context->Vector(context->Dim(filter, 3)));
  for (int i = 2; i < context->num_outputs(); ++i) {
    context->set_output(i, context->input(1));
  }
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
    .Output("filter_gradient: float")
    .Output("bias_gradient: float")
    .Output("input_gradient: float")
    .Attr("relu: bool")
    .SetShapeFn(GradientShape)
    .Doc("The gradients of `Conv3x3`, given that of its output.");

REGISTER_OP("Conv3x3Pool")
    .Input("input: float")
    .Input("filter: float")
    .Input("bias: float")
    .Output("output: float")
    .Output("places: uint8")
    .SetShapeFn(PooledShape)
    .Doc(R"doc(
As `Conv3x3` followed by the maximum of 3x3 pixels, with stride 2.

places: which of the nine it is.
)doc");

REGISTER_OP("Conv3x3PoolGradient")
    .Input("gradient: float")
    .Input("input: float")
    .Input("filter: float")
    .Input("places: uint8")
    .Output("filter_gradient: float")
    .Output("bias_gradient: float")
    .Output("input_gradient: num_input_gradients * float")
    .Attr("num_input_gradients: int >= 0")
    .SetShapeFn(GradientShape)
    .Doc(R"doc(
The gradients of `Conv3x3Pool`, given that of its output.

input_gradient: one, or none if the input has less than 16 channels.
)doc");

REGISTER_KERNEL_BUILDER(Name("Conv3x3").Device(tensorflow::DEVICE_CPU),
                        Convolution<false>);
REGISTER_KERNEL_BUILDER(Name("Conv3x3Gradient").Device(tensorflow::DEVICE_CPU),
                        Gradient<false>);
REGISTER_KERNEL_BUILDER(Name("Conv3x3Pool").Device(tensorflow::DEVICE_CPU),
                        Convolution<true>);
REGISTER_KERNEL_BUILDER(
    Name("Conv3x3PoolGradient").Device(tensorflow::DEVICE_CPU), Gradient<true>);

}  // namespace
}  // namespace impala

// Whether this processor can run the ops.
extern "C" bool ImpalaConvolutionSupported() { return impala::Supported(); }
