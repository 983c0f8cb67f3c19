/* Quantized rows times a few tokens, and rows rebuilt: integer codes of 2, 4 and 8 bits on CPU.

A unit is LANES words of 32 / BITS codes (LANES is 16 for 8 bits, else 8); bit BITS * c of word j belongs to column
LANES * c + j, so one shift and one mask give LANES neighbouring columns as they lie in x. A group is a whole number of
units. Sums are float32:

    y[row] = sum over groups of scale * (sum of code * x - zero * sum of x)
*/

#include <stdint.h>

typedef float float8 __attribute__((vector_size(32), aligned(4)));
typedef float float16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t int8x __attribute__((vector_size(32), aligned(4)));
typedef int32_t int16x __attribute__((vector_size(64), aligned(4)));

/* CHAINS sums a token hide the latency of the multiply-add. */
#define DOT(NAME, BITS, LANES, INTS, TOKENS, CHAINS)                                                            \
  static void NAME(const float *x, const float *sums, const uint32_t *words, const float *scale,                \
                   const float *zero, float *y, int64_t first, int64_t last, int64_t rows, int64_t columns,     \
                   int64_t groups) {                                                                            \
    const int64_t units = columns / groups / (LANES * 32 / BITS);                                               \
    for (int64_t row = first; row < last; row++) {                                                              \
      const uint32_t *word = words + row * (columns * BITS / 32);                                               \
      float total[TOKENS] = {0};                                                                                \
      for (int64_t g = 0; g < groups; g++) {                                                                    \
        float##LANES acc[TOKENS][CHAINS] = {{{0}}};                                                             \
        const float *at = x + g * (columns / groups);                                                           \
        for (int64_t u = 0; u < units; u++) {                                                                   \
          const INTS w = *(const INTS *)word;                                                                   \
          _Pragma("GCC unroll 16") for (int c = 0; c < 32 / BITS; c++) {                                        \
            const float##LANES code = __builtin_convertvector((w >> (BITS * c)) & ((1 << BITS) - 1), float##LANES); \
            _Pragma("GCC unroll 4") for (int m = 0; m < TOKENS; m++)                                            \
              acc[m][c % CHAINS] += code * *(const float##LANES *)(at + m * columns + LANES * c);               \
          }                                                                                                     \
          word += LANES;                                                                                        \
          at += LANES * 32 / BITS;                                                                              \
        }                                                                                                       \
        for (int m = 0; m < TOKENS; m++) {                                                                      \
          float##LANES lanes = acc[m][0];                                                                       \
          float sum = 0;                                                                                        \
          for (int k = 1; k < CHAINS; k++) lanes += acc[m][k];                                                  \
          for (int j = 0; j < LANES; j++) sum += lanes[j];                                                      \
          total[m] += scale[row * groups + g] * (sum - zero[row * groups + g] * sums[m * groups + g]);          \
        }                                                                                                       \
      }                                                                                                         \
      for (int m = 0; m < TOKENS; m++) y[m * rows + row] = total[m];                                            \
    }                                                                                                           \
  }

#define REBUILD(NAME, BITS, LANES)                                                                              \
  static void NAME(const uint32_t *words, const float *scale, const float *zero, float *weight, int64_t first,  \
                   int64_t last, int64_t columns, int64_t groups) {                                             \
    const int64_t units = columns / groups / (LANES * 32 / BITS);                                               \
    for (int64_t row = first; row < last; row++) {                                                              \
      const uint32_t *word = words + row * (columns * BITS / 32);                                               \
      float *out = weight + (row - first) * columns;                                                            \
      for (int64_t g = 0; g < groups; g++) {                                                                    \
        const float s = scale[row * groups + g], z = zero[row * groups + g];                                    \
        for (int64_t u = 0; u < units; u++) {                                                                   \
          for (int c = 0; c < 32 / BITS; c++)                                                                   \
            for (int j = 0; j < LANES; j++)                                                                     \
              out[LANES * c + j] = s * ((float)(int32_t)((word[j] >> (BITS * c)) & ((1u << BITS) - 1)) - z);    \
          word += LANES;                                                                                        \
          out += LANES * 32 / BITS;                                                                             \
        }                                                                                                       \
      }                                                                                                         \
    }                                                                                                           \
  }

#define FORMAT(BITS, LANES, INTS)            \
  DOT(dot_##BITS##_1, BITS, LANES, INTS, 1, 4) \
  DOT(dot_##BITS##_2, BITS, LANES, INTS, 2, 4) \
  DOT(dot_##BITS##_3, BITS, LANES, INTS, 3, 2) \
  DOT(dot_##BITS##_4, BITS, LANES, INTS, 4, 2) \
  REBUILD(rebuild_##BITS, BITS, LANES)

FORMAT(2, 8, int8x)
FORMAT(4, 8, int8x)
FORMAT(8, 16, int16x)

typedef void (*dot_function)(const float *, const float *, const uint32_t *, const float *, const float *, float *,
                             int64_t, int64_t, int64_t, int64_t, int64_t);
typedef void (*rebuild_function)(const uint32_t *, const float *, const float *, float *, int64_t, int64_t, int64_t,
                                 int64_t);

#define DOTS(BITS) {dot_##BITS##_1, dot_##BITS##_2, dot_##BITS##_3, dot_##BITS##_4}

static const dot_function dots[3][4] = {DOTS(2), DOTS(4), DOTS(8)};
static const rebuild_function rebuilds[3] = {rebuild_2, rebuild_4, rebuild_8};

static int format(int64_t bits) { return bits == 2 ? 0 : bits == 4 ? 1 : 2; }

/* y (tokens, rows) for x (tokens, columns), 1 to 4 tokens; sums (tokens, groups) of x. */
void tnc_dot(const float *x, const float *sums, const uint32_t *words, const float *scale, const float *zero, float *y,
             int64_t tokens, int64_t rows, int64_t columns, int64_t groups, int64_t bits, int64_t threads) {
  const dot_function run = dots[format(bits)][tokens - 1];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++)
    run(x, sums, words, scale, zero, y, rows * part / threads, rows * (part + 1) / threads, rows, columns, groups);
}

/* Rows first to last of the matrix into weight (last - first, columns). */
void tnc_rebuild(const uint32_t *words, const float *scale, const float *zero, float *weight, int64_t first,
                 int64_t last, int64_t columns, int64_t groups, int64_t bits, int64_t threads) {
  const rebuild_function run = rebuilds[format(bits)];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++) {
    const int64_t begin = first + (last - first) * part / threads;
    run(words, scale, zero, weight + (begin - first) * columns, begin, first + (last - first) * (part + 1) / threads,
        columns, groups);
  }
}
