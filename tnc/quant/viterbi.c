/* Viterbi's algorithm on a bitshift trellis, bit for bit as tnc/quant/viterbi.py: a mistake of one rounding would show.

A state is D digits of b bits, the newest lowest; K = 2^b. `before` holds, for every group of the D - 1 newest digits
known before a step, the least cost of a path there. With the step's digit the states of a group part, and the least
over the oldest digit is the next `before`:

    next[rest K + new] = min over old of before[old R + rest] + (quadratic level + linear) level,   R = K^(D-2)

Neighbouring states lie in one vector, each entry of `before` repeated K times. All arrays `before` of a ring are
kept, and the path is found from them backwards, computing the K costs that it chooses from again.
*/

#include <stdint.h>
#include <string.h>

#define ROOM 16 /* floats after an array that a load of a vector may touch */

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define W 16
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

typedef float vector __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * W)));

#if defined(__AVX512F__)
#define SMALLER(a, b) ((vector)_mm512_min_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX__)
#define SMALLER(a, b) ((vector)_mm256_min_ps((__m256)(a), (__m256)(b)))
#else
static inline vector SMALLER(vector a, vector b) {
  const lanes below = a < b;
  return (vector)(((lanes)a & below) | ((lanes)b & ~below));
}
#endif

/* W lanes: the entries of `from`, each K times. */
#define REPEATED(NAME, K)                                                        \
  static inline __attribute__((always_inline)) vector NAME(const float *from) {  \
    if (K >= W) return *from - (vector){0};                                      \
    lanes index;                                                                 \
    for (int i = 0; i < W; i++) index[i] = i / K;                                \
    return __builtin_shuffle(*(const vector *)from, index);                      \
  }

#define STEP(NAME, K, REPEAT)                                                                                \
  REPEATED(REPEAT, K)                                                                                        \
  static void NAME(const float *levels, const float *before, float *next, float linear, float quadratic,     \
                   int64_t groups) {                                                                         \
    const int64_t rests = groups / K;                                                                        \
    for (int64_t at = 0; at < groups; at += W) {                                                             \
      vector least = {0};                                                                                    \
      _Pragma("GCC unroll 16") for (int old = 0; old < K; old++) {                                           \
        const vector level = *(const vector *)(levels + old * groups + at);                                  \
        const vector cost = (level * quadratic + linear) * level + REPEAT(before + old * rests + at / K);    \
        least = old == 0 ? cost : SMALLER(cost, least);                                                      \
      }                                                                                                      \
      *(vector *)(next + at) = least;                                                                        \
    }                                                                                                        \
  }

STEP(step_4, 4, repeated_4)
STEP(step_8, 8, repeated_8)
STEP(step_16, 16, repeated_16)

typedef void (*step_function)(const float *, const float *, float *, float, float, int64_t);

static step_function step_of(int64_t bits) { return bits == 2 ? step_4 : bits == 3 ? step_8 : step_16; }

static inline float cost_of(const float *levels, const float *before, float linear, float quadratic, int64_t state,
                            int64_t bits) {
  const float level = levels[state];
  return (level * quadratic + linear) * level + before[state >> bits];
}

/* The cheapest state whose newer digits are those of `group`; the lowest oldest digit of several. */
static int64_t cheapest(const float *levels, const float *before, float linear, float quadratic, int64_t group,
                        int64_t groups, int64_t bits) {
  int64_t best = group;
  float least = cost_of(levels, before, linear, quadratic, group, bits);
  for (int64_t state = group + groups; state < groups << bits; state += groups) {
    const float cost = cost_of(levels, before, linear, quadratic, state, bits);
    if (cost < least) least = cost, best = state;
  }
  return best;
}

/* The cheapest group after a step, the lowest of several. */
static int64_t cheapest_group(const float *after, int64_t groups) {
  int64_t best = 0;
  for (int64_t group = 1; group < groups; group++)
    if (after[group] < after[best]) best = group;
  return best;
}

/* One ring, `count` apart: on a window around the seam first, then with the codes before its start held. */
static void ring(const float *levels, const float *linear, const float *quadratic, uint8_t *codes, float *held,
                 int64_t length, int64_t count, int64_t half, int64_t groups, int64_t bits) {
  const step_function step = step_of(bits);
  const int64_t stride = groups + ROOM;
#define AT(time) (((time) % length) * count)
#define COSTS(time) linear[AT(time)], quadratic[AT(time)]
  const int64_t first = length * ((half + length - 1) / length) - half, last = 2 * half - 1;
  memset(held, 0, groups * sizeof(float));
  for (int64_t t = 0; t <= last; t++) step(levels, held + t * stride, held + (t + 1) * stride, COSTS(first + t), groups);
  int64_t state, group = cheapest_group(held + (last + 1) * stride, groups);
  for (int64_t t = last; t >= half; t--, group = state >> bits)
    state = cheapest(levels, held + t * stride, COSTS(first + t), group, groups, bits);
  const int64_t seam = group; /* the codes before the ring's start */
  for (int64_t g = 0; g < groups; g++) held[g] = 1e30f;
  held[seam] = 0;
  for (int64_t t = 0; t + 1 < length; t++) step(levels, held + t * stride, held + (t + 1) * stride, COSTS(t), groups);
  for (int64_t t = length - 1; t >= 0; t--) {
    state = cheapest(levels, held + t * stride, COSTS(t), group, groups, bits);
    codes[t * count] = state & ((1 << bits) - 1);
    group = state >> bits;
  }
}

/* Codes (length, count) of `count` rings; held (threads, steps, groups + ROOM), steps = max(length, 2 half + 1). */
void tnc_encode(const float *levels, const float *linear, const float *quadratic, uint8_t *codes, float *held,
                int64_t length, int64_t count, int64_t half, int64_t digits, int64_t bits, int64_t threads) {
  const int64_t groups = (int64_t)1 << bits * (digits - 1), steps = length > 2 * half + 1 ? length : 2 * half + 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++)
    for (int64_t b = count * part / threads; b < count * (part + 1) / threads; b++)
      ring(levels, linear + b, quadratic + b, codes + b, held + part * steps * (groups + ROOM), length, count, half,
           groups, bits);
}

/* Least cost (count,) of any open sequence; held (threads, 2, groups + ROOM). */
void tnc_least(const float *levels, const float *linear, const float *quadratic, float *least, float *held,
               int64_t length, int64_t count, int64_t digits, int64_t bits, int64_t threads) {
  const int64_t groups = (int64_t)1 << bits * (digits - 1), stride = groups + ROOM;
  const step_function step = step_of(bits);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < threads; part++)
    for (int64_t b = count * part / threads; b < count * (part + 1) / threads; b++) {
      float *own = held + part * 2 * stride;
      memset(own, 0, groups * sizeof(float));
      for (int64_t t = 0; t < length; t++)
        step(levels, own + t % 2 * stride, own + (t + 1) % 2 * stride, linear[t * count + b], quadratic[t * count + b],
             groups);
      const float *after = own + length % 2 * stride;
      least[b] = after[cheapest_group(after, groups)];
    }
}
