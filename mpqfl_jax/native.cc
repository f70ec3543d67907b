// Passes over large arrays that store past the caches, as XLA's FFI calls.
//
// A processor that stores a number reads its cache line first, unless told that
// nobody will read it soon. XLA never tells, so that a pass which does little
// but write moves up to twice as much memory as it has to. Each function here
// gives the bits that its counterpart in `quantize.py` gives, for one block or
// a batch of them.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

#if !defined(__AVX2__) || !defined(__F16C__)
#error "expected a processor with AVX2 and F16C"
#endif

namespace {

namespace ffi = xla::ffi;

using Bytes = ffi::Buffer<ffi::U8>;
using Halves = ffi::Buffer<ffi::U16>;
using Floats = ffi::Buffer<ffi::F32>;

constexpr float kLargest = 0x1p126f;
// What is computed in the first-level cache before it is stored: little, so
// that loads and stores take turns.
constexpr int64_t kTileBytes = 1024;
// Entries, or bytes of codes, that a thread takes at a time, at least.
constexpr int64_t kLeastChunk = int64_t{1} << 16;
// Passes that read and write less leave what they write in a last-level cache
// for whoever reads it next. Virtual machines do not tell its size.
constexpr int64_t kLeastBypass = int64_t{32} << 20;
constexpr int64_t kLine = 64;

int64_t CeilOfRatio(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many rows there are, one scale each.
int64_t Rows(Floats scale) {
  return std::max<int64_t>(scale.element_count(), 1);
}

float FromBits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

// Runs run(0) ... run(count - 1) on the caller's thread and the pool's.
//
// The caller waits for calls that have begun, never for a thread to come free:
// that one may be waiting for this.
template <typename Run>
void ForEach(ffi::ThreadPool pool, int64_t count, Run run) {
  struct State {
    Run run;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    State(Run run, int64_t count) : run(std::move(run)), count(count) {}
  };
  auto state = std::make_shared<State>(std::move(run), count);
  auto work = [state] {
    for (int64_t i; (i = state->next.fetch_add(1)) < state->count;) {
      state->run(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min(pool.num_threads(), count); ++i) {
    pool.Schedule(std::function<void()>(work));
  }
  work();
  while (state->done.load(std::memory_order_acquire) < count) {
    std::this_thread::yield();
  }
}

// Runs run(row, begin, end) for all of `batch` rows of `count` entries.
//
// A thread takes as many entries at a time as there are for each, at least
// `kLeastChunk`: it reads ahead in few streams. They may be of several rows.
template <typename Run>
void ForChunks(ffi::ThreadPool pool, int64_t batch, int64_t count, Run run) {
  const int64_t all = batch * count;
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t share = std::max(CeilOfRatio(all, threads), kLeastChunk);
  const int64_t chunk = CeilOfRatio(share, kLine) * kLine;
  ForEach(pool, CeilOfRatio(all, chunk), [=](int64_t i) {
    const int64_t end = std::min((i + 1) * chunk, all);
    for (int64_t at = i * chunk; at < end;) {
      const int64_t row = at / count, first = row * count;
      const int64_t stop = std::min(first + count, end);
      run(row, at - first, stop - first);
      at = stop;
    }
    // Of `StoreLines`.
    _mm_sfence();
  });
}

// Stores whole cache lines past the caches; `out` is aligned to one. A fence is
// wanted before other threads read them.
void StoreLines(char* out, const char* in, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) {
#ifdef __AVX512F__
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i),
                        _mm512_load_si512(in + i));
#else
    for (int64_t j = i; j < i + kLine; j += 32) {
      _mm256_stream_si256(
          reinterpret_cast<__m256i*>(out + j),
          _mm256_load_si256(reinterpret_cast<const __m256i*>(in + j)));
    }
#endif
  }
}

// Computes out[0] ... out[count - 1] by fill(to, begin, count), tile by tile.
template <typename T, typename Fill>
void Store(T* out, int64_t count, bool bypass, Fill fill) {
  if (!bypass) {
    fill(out, 0, count);
    return;
  }
  const int64_t past = reinterpret_cast<uintptr_t>(out) % kLine;
  // Up to the first cache line's end, then whole ones.
  int64_t i = std::min<int64_t>((kLine - past) % kLine / sizeof(T), count);
  fill(out, 0, i);
  constexpr int64_t kTile = kTileBytes / sizeof(T);
  alignas(kLine) T tile[kTile];
  for (; i < count; i += kTile) {
    const int64_t size = std::min(kTile, count - i);
    const int64_t lines = size * sizeof(T) / kLine * kLine;
    fill(tile, i, size);
    StoreLines(reinterpret_cast<char*>(out + i),
               reinterpret_cast<const char*>(tile), lines);
    std::memcpy(reinterpret_cast<char*>(out + i) + lines,
                reinterpret_cast<const char*>(tile) + lines,
                size * sizeof(T) - lines);
  }
}

bool Bypasses(int64_t bytes) { return bytes >= kLeastBypass; }

// Computes `out`, of as many entries as `x`, in `batch` rows:
// fill(row, from, size, to), where `from` points at `size` entries of `x`.
template <typename In, typename Out, typename Fill>
ffi::Error Pass(ffi::ThreadPool pool, int64_t batch, In x, Out out, Fill fill) {
  const int64_t count = x.element_count() / batch;
  const auto* in = x.typed_data();
  auto* first = out->typed_data();
  const bool bypass = Bypasses(x.size_bytes() + out->size_bytes());
  ForChunks(pool, batch, count, [=](int64_t row, int64_t begin, int64_t end) {
    const int64_t at = row * count + begin;
    Store(first + at, end - begin, bypass,
          [=](auto* to, int64_t from, int64_t size) {
            fill(row, in + at + from, size, to);
          });
  });
  return ffi::Error::Success();
}

// What loops over vectors are written in where compilers make worse ones.
#ifdef __AVX512F__
constexpr int kLanes = 16;
using Vector = __m512;
using Mask = __mmask16;
Vector Load(const float* x) { return _mm512_loadu_ps(x); }
void Save(Vector v, float* to) { _mm512_storeu_ps(to, v); }
Vector All(float x) { return _mm512_set1_ps(x); }
// Of NaN and a number in this order, the number.
Vector Min(Vector a, Vector b) { return _mm512_min_ps(a, b); }
Vector Max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
Mask EitherIsNan(Vector a, Vector b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
}
Mask Or(Mask a, Mask b) { return a | b; }
bool Any(Mask mask) { return mask; }
Vector NanToZero(Vector v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
}
// The last eight bits of the nearest whole number and an offset.
auto Byte(Vector v, int offset) {
  return _mm512_cvtepi32_epi8(
      _mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(offset)));
}
auto Float16(Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
constexpr int kLanes = 8;
using Vector = __m256;
using Mask = __m256;
Vector Load(const float* x) { return _mm256_loadu_ps(x); }
void Save(Vector v, float* to) { _mm256_storeu_ps(to, v); }
Vector All(float x) { return _mm256_set1_ps(x); }
// Of NaN and a number in this order, the number.
Vector Min(Vector a, Vector b) { return _mm256_min_ps(a, b); }
Vector Max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
Mask EitherIsNan(Vector a, Vector b) {
  return _mm256_cmp_ps(a, b, _CMP_UNORD_Q);
}
Mask Or(Mask a, Mask b) { return _mm256_or_ps(a, b); }
bool Any(Mask mask) { return _mm256_movemask_ps(mask); }
Vector NanToZero(Vector v) {
  return _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
}
// The last eight bits of the nearest whole number and an offset.
auto Byte(Vector v, int offset) {
  const __m256i last = _mm256_shuffle_epi8(
      _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(offset)),
      _mm256_set1_epi32(0x0C080400));
  return _mm_cvtsi128_si64(_mm_unpacklo_epi32(
      _mm256_castsi256_si128(last), _mm256_extracti128_si256(last, 1)));
}
auto Float16(Vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#endif

using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

// NaN to 0, clamped.
Vector Sound(Vector v, float least, float most) {
  return Min(All(most), Max(All(least), NanToZero(v)));
}

auto Bfloat16(Vector v) {
  const auto bits = reinterpret_cast<Words>(v);
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16,
                                 Shorts);
}

// to[i] = one(x[i]), where `one` takes a vector and gives several numbers.
template <typename T, typename One>
void Each(const float* x, int64_t size, T* to, One one) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const auto some = one(Load(x + i));
    static_assert(sizeof(some) == kLanes * sizeof(T));
    std::memcpy(to + i, &some, sizeof(some));
  }
  if (i == size) return;
  float rest[kLanes] = {};
  std::copy(x + i, x + size, rest);
  const auto some = one(Load(rest));
  std::memcpy(to + i, &some, (size - i) * sizeof(T));
}

// `quantize.extremes`: [batch, count] -> [batch, 2].
ffi::Error Extremes(ffi::ThreadPool pool, Floats x, ffi::Result<Floats> ends) {
  constexpr int kParallel = 4, kStep = kParallel * kLanes;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t batch = std::max<int64_t>(ends->element_count() / 2, 1);
  const int64_t count = x.element_count() / batch;
  const float* in = x.typed_data();
  float* out = ends->typed_data();
  for (int64_t row = 0; row < batch; ++row) {
    out[2 * row] = kLargest;
    out[2 * row + 1] = -kLargest;
  }
  auto mutex = std::make_shared<std::mutex>();
  ForChunks(pool, batch, count, [=](int64_t row, int64_t begin, int64_t end) {
    const float* y = in + row * count;
    Vector low[kParallel], high[kParallel];
    Mask nan[kParallel / 2] = {};
    std::fill_n(low, kParallel, All(kLargest));
    std::fill_n(high, kParallel, All(-kLargest));
    auto see = [&](const float* x) {
      Vector v[kParallel];
      for (int j = 0; j < kParallel; ++j) {
        v[j] = Load(x + j * kLanes);
        low[j] = Min(v[j], low[j]);
        high[j] = Max(v[j], high[j]);
      }
      for (int j = 0; j < kParallel / 2; ++j) {
        nan[j] = Or(nan[j], EitherIsNan(v[2 * j], v[2 * j + 1]));
      }
    };
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) see(y + i);
    if (i < end) {
      float rest[kStep];
      std::fill(std::copy(y + i, y + end, rest), rest + kStep, y[begin]);
      see(rest);
    }
    for (int j = 1; j < kParallel; ++j) {
      low[0] = Min(low[j], low[0]);
      high[0] = Max(high[j], high[0]);
      nan[0] = Or(nan[0], nan[j / 2]);
    }
    float lows[kLanes], highs[kLanes];
    Save(low[0], lows);
    Save(high[0], highs);
    float bottom = *std::min_element(lows, lows + kLanes);
    float top = *std::max_element(highs, highs + kLanes);
    if (Any(nan[0]) || bottom == -kInfinity || top == kInfinity) {
      bottom = -kLargest;
      top = kLargest;
    }
    bottom = std::max(bottom, -kLargest);
    top = std::min(top, kLargest);
    // Other threads have other parts of the row, if it is not whole.
    const bool whole = end - begin == count;
    const auto lock = whole ? std::unique_lock<std::mutex>()
                            : std::unique_lock<std::mutex>(*mutex);
    out[2 * row] = std::min(out[2 * row], bottom);
    out[2 * row + 1] = std::max(out[2 * row + 1], top);
  });
  return ffi::Error::Success();
}

// `quantize.quantize` to the nearest, codes from 0 below `levels`:
// [batch, count], a scale and a zero point a row -> [batch, count].
ffi::Error ToGrid(ffi::ThreadPool pool, Floats x, Floats scale, Floats zero,
                  ffi::Result<Bytes> codes, int64_t levels) {
  const float* scales = scale.typed_data();
  const float* zeros = zero.typed_data();
  return Pass(
      pool, Rows(scale), x, codes,
      [=](int64_t row, const float* from, int64_t size, uint8_t* to) {
        const float reciprocal = 1 / scales[row];
        const float least = -zeros[row], most = levels - 1 - zeros[row];
        const auto offset = static_cast<int>(zeros[row]);
        Each(from, size, to, [=](Vector v) {
          // Ends are whole numbers: what is clamped is rounded alike.
          return Byte(Sound(v * All(reciprocal), least, most), offset);
        });
      });
}

// Decodes what one plane holds: out[i] = (code(bytes[i]) - zero) * scale.
template <typename Code>
void Plane(const uint8_t* bytes, int64_t count, float scale, float zero,
           float* out, bool bypass, Code code) {
  Store(out, count, bypass,
        [=](float* __restrict to, int64_t from, int64_t n) {
          const uint8_t* __restrict b = bytes + from;
          for (int64_t i = 0; i < n; ++i) {
            to[i] = (static_cast<float>(code(b[i])) - zero) * scale;
          }
        });
}

// `quantize.dequantize` of what `bitpack.unpack` gives, for codes of which a
// whole number fills a byte: [batch, bytes], a scale and a zero point a row ->
// [batch, count].
ffi::Error FromGrid(ffi::ThreadPool pool, Bytes packed, Floats scale,
                    Floats zero, ffi::Result<Floats> x, int64_t levels) {
  const int64_t batch = Rows(scale);
  const int64_t size = packed.element_count() / batch;
  const int64_t count = x->element_count() / batch;
  const uint8_t* in = packed.typed_data();
  const float* scales = scale.typed_data();
  const float* zeros = zero.typed_data();
  float* out = x->typed_data();
  const bool bypass = Bypasses(packed.size_bytes() + x->size_bytes());
  int width = 1;
  while ((int64_t{1} << width) < levels) ++width;
  const int planes = levels == 3 ? 5 : 8 / width;
  const int32_t mask = (1 << width) - 1;
  ForChunks(pool, batch, size, [=](int64_t row, int64_t begin, int64_t end) {
    const uint8_t* bytes = in + row * size + begin;
    int power = 1;
    for (int p = 0; p < planes; ++p, power *= 3) {
      // The last plane may be short, or missing.
      const int64_t n = std::min(end, count - p * size) - begin;
      if (n <= 0) break;
      float* to = out + row * count + p * size + begin;
      auto plane = [=](auto code) {
        Plane(bytes, n, scales[row], zeros[row], to, bypass, code);
      };
      if (levels == 3) {
        // Divided by a power of three, but of the last digit its remainder.
        const int factor = CeilOfRatio(1 << 16, power);
        const int third = CeilOfRatio(1 << 16, 3);
        const int base = p == planes - 1 ? 0 : 3;
        plane([=](int32_t b) {
          const int32_t shifted = (b * factor) >> 16;
          return shifted - base * ((shifted * third) >> 16);
        });
      } else {
        plane([=](int32_t b) { return (b >> (p * width)) & mask; });
      }
    }
  });
  return ffi::Error::Success();
}

// `quantize.to_format` to float16.
ffi::Error ToFloat16(ffi::ThreadPool pool, Floats x, ffi::Result<Halves> out) {
  return Pass(pool, 1, x, out,
              [](int64_t, const float* from, int64_t size, uint16_t* to) {
                Each(from, size, to, [](Vector v) {
                  return Float16(Sound(v, -65504, 65504));
                });
              });
}

// `quantize.to_format` to bfloat16.
ffi::Error ToBfloat16(ffi::ThreadPool pool, Floats x,
                      ffi::Result<Halves> out) {
  return Pass(pool, 1, x, out,
              [](int64_t, const float* from, int64_t size, uint16_t* to) {
                Each(from, size, to, [](Vector v) {
                  return Bfloat16(Sound(v, -kLargest, kLargest));
                });
              });
}

void FloatsOf(const uint16_t* halves, int64_t size, float* to) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const auto* eight = reinterpret_cast<const __m128i*>(halves + i);
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(eight)));
  }
  for (; i < size; ++i) to[i] = _cvtsh_ss(halves[i]);
}

// `quantize.from_format` of float16.
ffi::Error FromFloat16(ffi::ThreadPool pool, Halves x,
                       ffi::Result<Floats> out) {
  return Pass(pool, 1, x, out,
              [](int64_t, const uint16_t* from, int64_t size, float* to) {
                FloatsOf(from, size, to);
              });
}

// `quantize.from_format` of bfloat16.
ffi::Error FromBfloat16(ffi::ThreadPool pool, Halves x,
                        ffi::Result<Floats> out) {
  return Pass(pool, 1, x, out,
              [](int64_t, const uint16_t* __restrict from, int64_t size,
                 float* __restrict to) {
                for (int64_t i = 0; i < size; ++i) {
                  to[i] = FromBits(uint32_t{from[i]} << 16);
                }
              });
}

// `quantize.from_format` of a float8, times a scale a row: [batch, count] ->
// [batch, count]. It has so many bits of mantissa; a float16 of its pattern is
// to be multiplied by `unit`.
ffi::Error FromFloat8(ffi::ThreadPool pool, Bytes x, Floats scale,
                      ffi::Result<Floats> out, int64_t mantissa, float unit) {
  const float* scales = scale.typed_data();
  const int shift = 10 - static_cast<int>(mantissa);
  return Pass(
      pool, Rows(scale), x, out,
      [=](int64_t row, const uint8_t* from, int64_t size, float* to) {
        const float factor = scales[row];
        constexpr int64_t kPatterns = 256;
        for (int64_t i = 0; i < size; i += kPatterns) {
          const int64_t n = std::min(kPatterns, size - i);
          uint16_t patterns[kPatterns];
          for (int64_t j = 0; j < n; ++j) {
            const int code = from[i + j];
            patterns[j] = (code & 0x7F) << shift | (code & 0x80) << 8;
          }
          FloatsOf(patterns, n, to + i);
          for (int64_t j = i; j < i + n; ++j) to[j] = to[j] * unit * factor;
        }
      });
}

}  // namespace

#define BOUND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(extremes, Extremes,
                              BOUND.Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    to_grid, ToGrid,
    BOUND.Arg<Floats>().Arg<Floats>().Arg<Floats>().Ret<Bytes>().Attr<int64_t>(
        "levels"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    from_grid, FromGrid,
    BOUND.Arg<Bytes>().Arg<Floats>().Arg<Floats>().Ret<Floats>().Attr<int64_t>(
        "levels"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(to_float16, ToFloat16,
                              BOUND.Arg<Floats>().Ret<Halves>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(from_float16, FromFloat16,
                              BOUND.Arg<Halves>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(to_bfloat16, ToBfloat16,
                              BOUND.Arg<Floats>().Ret<Halves>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(from_bfloat16, FromBfloat16,
                              BOUND.Arg<Halves>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(from_float8, FromFloat8,
                              BOUND.Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("mantissa")
                                  .Attr<float>("unit"));
