/* Trellis-coded rows times a few tokens, and rows rebuilt, on CPU; built for BITS of 2, 3 or 4, a SKEW and a CODE.

A unit is a number of rows whose codes fill whole words (tnc/kernels/trellis_words.py): words[unit][plane][line], the
first row's code highest, so that the last bits of a row and of the rows before it, its state, are a window of
neighbouring bits. Neighbouring lines lie in one vector. Line l of a unit has in its row r the column l - SKEW r: lines
are anti-diagonals (1) or columns (0), and x lies for them as it is.

Where a sequence begins in a line, its first states reach back to its own end: seams[mark][line] holds the row (plus
BIAS) and the bits that come before it, marks[unit][vector of lines] is the place of those that have any, else -1.
*/

#include <stdint.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#define W 16    /* lines a vector; two or four registers where the processor has none of 512 bits */
#define BIAS 32 /* added to the row of a seam, which may lie before the unit */
#define PLANES (BITS == 2 ? 1 : BITS == 3 ? 3 : 2)
#define R (32 * PLANES / BITS) /* rows of a unit */

typedef float floats __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * W), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

/* Sum of the four bytes less 510. */
INLINE ints bytes(words w) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32(_mm512_set1_epi32(-510), (__m512i)w, _mm512_set1_epi32(0x01010101));
#else
  const words pairs = (w & 0x00FF00FFu) + ((w >> 8) & 0x00FF00FFu);
  return (ints)((pairs + (pairs >> 16)) & 0xFFFFu) - 510;
#endif
}

/* float32 of a normal float16 in the low half. */
INLINE floats half(words w) { return (floats)((((w & 0x7FFFu) << 13) + (112u << 23)) | ((w & 0x8000u) << 16)); }

/* Levels of states, up to a factor that the scale of the row takes. */
INLINE floats level(words state) {
#if CODE == 0 /* 1mad */
  return __builtin_convertvector(bytes(state * 34038481u + 76625530u), floats);
#else /* 3inst */
  const words w = ((state * 89226354u + 64248484u) & 0x8FFF8FFFu) ^ 0x3B603B60u;
  return half(w) + half(w >> 16);
#endif
}

struct coded {
  const uint32_t *stream;
  const int32_t *marks, *seams;
  const float *scale;
  int64_t rows, columns, lines, state_bits;
};

#define UNPACKED                                               \
  const uint32_t *stream = w->stream + unit * PLANES * lines;  \
  const int32_t *marks = w->marks + unit * lines / W;          \
  const int state_bits = w->state_bits;                        \
  const words mask = (words){0} + ((1u << state_bits) - 1u);

/* The words of a unit's lines l .. and, first, those before them. */
#define LOAD                                                                                        \
  words at[PLANES + 1];                                                                             \
  at[0] = unit > 0 ? *(const words *)(stream + l - lines + SKEW * R) : (words){0};               \
  for (int p = 0; p < PLANES; p++) at[p + 1] = *(const words *)(stream + l + p * lines);

/* States of row r, as if no sequence began near; they have at most 16 bits. */
INLINE words window(const words *at, words mask, int r) {
  const int end = BITS * (r + 1), plane = (end - 1) / 32, shift = 32 * (plane + 1) - end;
  words state = at[plane + 1] >> shift;
  if (shift > 16) state |= at[plane] << ((32 - shift) & 31);
  return state & mask;
}

/* States of row r where a sequence begins in the row `seam >> 16`, its end being the bits `seam & 0xFFFF`. */
INLINE words seamed(words state, ints seam, int state_bits, words mask, int r) {
  const ints own = (r + 1 + BIAS - (seam >> 16)) * BITS, whole = (own <= 0) | (own > state_bits);
  const words count = (words)((own & ~whole) | (state_bits & whole)), one = (words){0} + 1u;
  return (((words)seam & 0xFFFFu) << count | (state & ((one << count) - one))) & mask;
}

/* COUNT rows of a unit from `start` on: as many sums a token as there are registers for. Vectors of lines with seams
come last, in a loop of their own: they are few, and the registers of the first loop do not hold their numbers. */
#define DOT(TOKENS)                                                                                               \
  INLINE void rows_##TOKENS(const struct coded *w, const float *x, int64_t stride, float *y, int64_t unit,        \
                            const int start) {                                                                    \
    enum { COUNT = 16 / TOKENS };                                                                                 \
    const int64_t lines = w->lines;                                                               \
    UNPACKED                                                                                                      \
    floats sum[TOKENS][COUNT] = {{{0}}};                                                                          \
    const float *from = x + SKEW * (R - start);                                                                   \
    for (int64_t l = 0; l < lines; l += W) {                                                                      \
      if (marks[l / W] >= 0) continue;                                                                            \
      LOAD                                                                                                        \
      _Pragma("GCC unroll 16") for (int r = 0; r < COUNT; r++) {                                                  \
        const floats found = level(window(at, mask, start + r));                                                  \
        _Pragma("GCC unroll 4") for (int m = 0; m < TOKENS; m++)                                                  \
          sum[m][r] += found * *(const floats *)(from + m * stride + l - SKEW * r);                               \
      }                                                                                                           \
    }                                                                                                             \
    for (int64_t l = 0; l < lines; l += W) {                                                                      \
      if (marks[l / W] < 0) continue;                                                                             \
      LOAD                                                                                                        \
      const ints seam = *(const ints *)(w->seams + (int64_t)marks[l / W] * W);                                    \
      _Pragma("GCC unroll 16") for (int r = 0; r < COUNT; r++) {                                                  \
        const floats found = level(seamed(window(at, mask, start + r), seam, state_bits, mask, start + r));       \
        _Pragma("GCC unroll 4") for (int m = 0; m < TOKENS; m++)                                                  \
          sum[m][r] += found * *(const floats *)(from + m * stride + l - SKEW * r);                               \
      }                                                                                                           \
    }                                                                                                             \
    for (int r = 0; r < COUNT; r++) {                                                                             \
      const int64_t row = unit * R + start + r;                                                                   \
      if (row >= w->rows) break;                                                                                  \
      for (int m = 0; m < TOKENS; m++) {                                                                          \
        float total = 0;                                                                                          \
        for (int i = 0; i < W; i++) total += sum[m][r][i];                                                        \
        y[m * w->rows + row] = w->scale[row] * total;                                                             \
      }                                                                                                           \
    }                                                                                                             \
  }                                                                                                               \
  static void dot_##TOKENS(const struct coded *w, const float *x, int64_t stride, float *y, int64_t unit) {       \
    _Pragma("GCC unroll 8") for (int start = 0; start < R; start += 16 / TOKENS)                                  \
      rows_##TOKENS(w, x, stride, y, unit, start);                                                                \
  }

DOT(1)
DOT(2)
DOT(4)

static void rebuild(const struct coded *w, float *weight, int64_t unit) {
  const int64_t lines = w->lines;
  UNPACKED
  for (int64_t l = 0; l < lines; l += W) {
    LOAD
    const int32_t mark = marks[l / W];
    for (int r = 0; r < R && unit * R + r < w->rows; r++) {
      words state = window(at, mask, r);
      if (mark >= 0) state = seamed(state, *(const ints *)(w->seams + (int64_t)mark * W), state_bits, mask, r);
      const floats value = level(state) * w->scale[unit * R + r];
      const int64_t column = l - SKEW * r;
      float *out = weight + r * w->columns + column;
      if (column >= 0 && column + W <= w->columns) *(floats *)out = value;
      else
        for (int i = 0; i < W; i++)
          if (column + i >= 0 && column + i < w->columns) out[i] = value[i];
    }
  }
}

#define CODED const struct coded w = {stream, marks, seams, scale, rows, columns, lines, state_bits};

/* y (tokens, rows) for 1, 2 or 4 tokens x (tokens, stride); with SKEW, R zeros come before the columns of x, and zeros
after them up to the last line. */
void tnc_trellis_dot(const uint32_t *stream, const int32_t *marks, const int32_t *seams, const float *scale,
                     const float *x, float *y, int64_t tokens, int64_t stride, int64_t rows, int64_t columns,
                     int64_t lines, int64_t state_bits, int64_t threads) {
  CODED
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = 0; unit < (rows + R - 1) / R; unit++)
    (tokens == 1 ? dot_1 : tokens == 2 ? dot_2 : dot_4)(&w, x, stride, y, unit);
}

/* Units first to last of the matrix into weight (rows of them, columns). */
void tnc_trellis_rebuild(const uint32_t *stream, const int32_t *marks, const int32_t *seams, const float *scale,
                         float *weight, int64_t first, int64_t last, int64_t rows, int64_t columns, int64_t lines,
                         int64_t state_bits, int64_t threads) {
  CODED
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t unit = first; unit < last; unit++) rebuild(&w, weight + (unit - first) * R * columns, unit);
}
