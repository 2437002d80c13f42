/* The codec's inner loops in C: histograms, code tables, rANS, grouping, paths of the trellis.
 *
 * Each function makes the same bytes as its reference in Python. A comment above the function names the reference,
 * which explains what it computes and why; this file only computes it fast. Each floating-point operation rounds
 * separately (-ffp-contract=off). Functions allocate nothing and trust no input: they check every read and write
 * against the sizes passed with it. Only birkhoff_sample reads a file.
 *
 * Loops that gain from vectors are written once as inline functions and compiled twice: for the machine's base
 * instructions, and for AVX2 if the target has it. AVX2 has its own function for decoding rANS, with gathers.
 */

#define _FILE_OFFSET_BITS 64

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 1
#include <immintrin.h>
#define TARGET_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"); }
#else
#define AVX2 0
#define TARGET_AVX2
static int has_avx2(void) { return 0; }
#endif

static int vectors = -1; /* -1: all that the machine has; 0: only base instructions, for tests */

static int use_avx2(void) { return AVX2 && vectors != 0 && has_avx2(); }

/* Raise this whenever a function's meaning changes. library.py compares it. */
EXPORT int32_t birkhoff_native_version(void) { return 16; }

/* Switch AVX2 on (1) or off (0). Returns whether it is in use. */
EXPORT int32_t birkhoff_native_vectors(int32_t wanted) {
    vectors = wanted ? -1 : 0;
    return use_avx2();
}

/* --- histograms: tables.histograms ----------------------------------------------------------------------------- */

static void histogram(const uint8_t *data, int64_t size, int64_t *counts) {
    memset(counts, 0, 256 * sizeof *counts);
    while (size > 0) {
        /* With one table, equal neighbours would wait for each other's sum. */
        uint32_t part[4][256];
        int64_t count = size < (1 << 30) ? size : (1 << 30), at = 0;
        memset(part, 0, sizeof part);
        for (; at + 8 <= count; at += 8) {
            uint64_t eight;
            memcpy(&eight, data + at, 8);
            part[0][eight & 255]++, part[1][eight >> 8 & 255]++, part[2][eight >> 16 & 255]++, part[3][eight >> 24 & 255]++;
            part[0][eight >> 32 & 255]++, part[1][eight >> 40 & 255]++, part[2][eight >> 48 & 255]++, part[3][eight >> 56]++;
        }
        for (; at < count; at++) part[0][data[at]]++;
        for (int symbol = 0; symbol < 256; symbol++)
            counts[symbol] += (int64_t)part[0][symbol] + part[1][symbol] + part[2][symbol] + part[3][symbol];
        data += count, size -= count;
    }
}

/* `flat` holds the streams, one after the other. `counts` is [streams][256]. */
EXPORT void birkhoff_histograms(const uint8_t *flat, int64_t streams, const int64_t *size, int64_t *counts) {
    for (int64_t s = 0; s < streams; flat += size[s++]) histogram(flat, size[s], counts + 256 * s);
}

/* --- code tables: entropy/tables.py ---------------------------------------------------------------------------- */

#define BITS 12
#define SLOTS (1 << BITS)
#define MOST_FINE 4   /* r */
#define MOST_RICE 7   /* k */
#define OCTAVES 16

static uint32_t log2_fixed(uint32_t value) { /* tables.log2_fixed */
    int whole = 31 - __builtin_clz(value);
    uint64_t y = (uint64_t)value << (31 - whole);
    uint32_t fraction = 0;
    for (int bit = 15; bit >= 0; bit--) {
        y = y * y >> 31;
        if (y >> 32) fraction |= 1u << bit, y >>= 1;
    }
    return (uint32_t)whole << 16 | fraction;
}

static uint32_t cost_of[SLOTS + 1]; /* bits of a symbol by frequency, in units of 2^-16 */

__attribute__((constructor)) static void fill_costs(void) {
    for (uint32_t f = SLOTS; f; f--) cost_of[f] = ((uint32_t)BITS << 16) - log2_fixed(f);
}

/* tables.frequencies_of: returns 0, or -1 if the fields make no table. Values are below 2^20, so quotients by their sum
 * that are not whole numbers differ from those by more than a double's rounding. */
INLINE int frequencies_of(const int32_t *field, int symbols, int fine, uint16_t *frequency) {
    int32_t value[256], found[256], used = 0, sum = 0, largest = 0;
    int64_t total = 0;
    for (int s = 0; s < symbols; s++) {
        int32_t q = field[s] - 1;
        value[s] = q < 0 ? 0 : ((1 << fine) + (q & ((1 << fine) - 1))) << (q >> fine);
        total += value[s], used += q >= 0;
    }
    if (used < 2) return -1;
    for (int s = 0; s < symbols; s++) found[s] = (int32_t)((double)value[s] * SLOTS / (double)total);
    for (int s = 0; s < symbols; s++) found[s] += value[s] && !found[s];
    for (int s = 0; s < symbols; s++) {
        sum += found[s];
        if (found[s] > found[largest]) largest = s;
    }
    found[largest] += SLOTS - sum;
    if (found[largest] < 1) return -1;
    for (int s = 0; s < symbols; s++) frequency[s] = (uint16_t)found[s];
    return 0;
}

INLINE int32_t field_of(int64_t count, int fine) { /* tables.fields_of */
    if (!count) return 0;
    int octave = 63 - __builtin_clzll((uint64_t)count);
    int64_t mantissa = octave > fine ? (count + ((int64_t)1 << (octave - fine - 1))) >> (octave - fine)
                                     : count << (fine - octave);
    return (int32_t)(((int64_t)(octave - 1) * (1 << fine)) + mantissa) + 1;
}

/* tables.reference_fit: writes a table to `out` (2048 bytes), its frequencies [256], and the cost of stream and table
 * in 2^-16 bits. Returns the table's bytes, or 0 if fewer than two symbols occur. */
INLINE int32_t table_of(const int64_t *counts, uint8_t *out, uint16_t *frequency, int64_t *cost) {
    int low = 0, high = 255;
    int64_t total = 0, scaled[256];
    memset(frequency, 0, 256 * sizeof *frequency);
    while (low < 256 && !counts[low]) low++;
    while (high > low && !counts[high]) high--;
    if (low >= high) return 0;
    int symbols = high - low + 1;
    for (int s = 0; s < symbols; s++) total += counts[low + s];
    for (int s = 0; s < symbols; s++) {
        int64_t count = counts[low + s];
        if (total > 32767 && count) {
            /* (count * 32767 + total / 2) / total, in two steps: counts go up to 2^36 */
            count = (count * 32767 + total / 2) / total;
            if (!count) count = 1;
        }
        scaled[s] = count;
    }
    int best_fine = -1, best_rice = 0;
    int64_t best = INT64_MAX;
    int32_t field[256];
    uint16_t found[256];
    for (int fine = 0; fine <= MOST_FINE; fine++) {
        for (int s = 0; s < symbols; s++) field[s] = field_of(scaled[s], fine);
        if (frequencies_of(field, symbols, fine, found)) continue;
        int64_t data = 0;
        for (int s = 0; s < symbols; s++)
            if (found[s]) data += counts[low + s] * cost_of[found[s]];
        int32_t code[256], last = 0;
        for (int s = 0; s < symbols; s++) {
            int32_t delta = field[s] - last;
            code[s] = delta >= 0 ? 2 * delta : -2 * delta - 1, last = field[s];
        }
        for (int rice = 0; rice <= MOST_RICE; rice++) {
            int32_t ones = 0;
            for (int s = 0; s < symbols; s++) ones += code[s] >> rice;
            int64_t cost_here = data + ((int64_t)(ones + symbols * (1 + rice)) << 16);
            if (cost_here < best) best = cost_here, best_fine = fine, best_rice = rice;
        }
    }
    if (best_fine < 0) return 0;
    for (int s = 0; s < symbols; s++) field[s] = field_of(scaled[s], best_fine);
    frequencies_of(field, symbols, best_fine, frequency + low);
    memset(out, 0, 2048);
    out[0] = (uint8_t)low, out[1] = (uint8_t)(symbols - 1), out[2] = (uint8_t)(best_fine | best_rice << 3);
    int64_t bit = 24;
    int32_t last = 0;
    for (int s = 0; s < symbols; s++) {
        int32_t delta = field[s] - last, z = delta >= 0 ? 2 * delta : -2 * delta - 1;
        last = field[s];
        for (int32_t ones = z >> best_rice; ones; ones--, bit++) out[bit >> 3] |= (uint8_t)(1 << (bit & 7));
        bit++;
        for (int k = 0; k < best_rice; k++, bit++) out[bit >> 3] |= (uint8_t)((z >> k & 1) << (bit & 7));
    }
    *cost = best + (24 << 16);
    return (int32_t)((bit + 7) >> 3);
}

TARGET_AVX2 static int32_t table_avx2(const int64_t *counts, uint8_t *out, uint16_t *frequency, int64_t *cost) {
    return table_of(counts, out, frequency, cost);
}

static int32_t table_base(const int64_t *counts, uint8_t *out, uint16_t *frequency, int64_t *cost) {
    return table_of(counts, out, frequency, cost);
}

/* tables.fit: writes the tables for `counts` [streams][256] to `data` [streams][2048], `length` (0: no table),
 * `frequency` [streams][256] and `cost`. */
EXPORT void birkhoff_table_fits(
    int64_t streams, const int64_t *counts, uint8_t *data, int64_t *length, uint16_t *frequency, int64_t *cost) {
    int32_t (*const fit)(const int64_t *, uint8_t *, uint16_t *, int64_t *) = use_avx2() ? table_avx2 : table_base;
    for (int64_t s = 0; s < streams; s++) {
        cost[s] = 0;
        length[s] = fit(counts + 256 * s, data + 2048 * s, frequency + 256 * s, cost + s);
    }
}

/* tables.parse: returns the bytes of the table, or -1 if it is not valid. `frequency` is [256]. */
EXPORT int32_t birkhoff_table_parse(const uint8_t *data, int64_t size, uint16_t *frequency) {
    memset(frequency, 0, 256 * sizeof *frequency);
    if (size < 3) return -1;
    int low = data[0], symbols = data[1] + 1, fine = data[2] & 7, rice = data[2] >> 3;
    if (low + symbols > 256 || fine > MOST_FINE || rice > MOST_RICE) return -1;
    int64_t bit = 24, end = size * 8;
    int32_t field[256], last = 0, most = OCTAVES << fine;
    for (int s = 0; s < symbols; s++) {
        int32_t ones = 0, z;
        while (bit < end && (data[bit >> 3] >> (bit & 7) & 1)) {
            bit++;
            if (++ones > 2 * most) return -1;
        }
        bit++; /* the zero */
        z = ones << rice;
        if (bit + rice > end) return -1;
        for (int k = 0; k < rice; k++, bit++) z |= (data[bit >> 3] >> (bit & 7) & 1) << k;
        last += z & 1 ? -(z >> 1) - 1 : z >> 1;
        if (last < 0 || last > most) return -1;
        field[s] = last;
    }
    while (bit & 7) {
        if (data[bit >> 3] >> (bit & 7) & 1) return -1;
        bit++;
    }
    if (frequencies_of(field, symbols, fine, frequency + low)) return -1;
    return (int32_t)(bit >> 3);
}

/* --- rANS: entropy/rans.py -------------------------------------------------------------------------------------- */

#define BLOCK (1 << 17)
#define MOST_LANES 32
#define LEAST_STATE (1u << 16)

/* How to divide by each frequency f, 1 to 4095: floor(x / f) = (x + more) * inverse >> 32 + shift for x < f * 2^20.
 *
 * With s = floor(log2 f), 2^(32 + s) / f is between 2^31 and 2^32. Round it up to m, with the error e = m f - 2^(32
 * + s). Then x m / 2^(32 + s) exceeds x / f by x e / (f 2^(32 + s)). The floor is right if this is less than 1 / f,
 * and, as x < f 2^20, that holds if e < 2^(12 + s) / f. Rounding down, with x + 1 for x, is right if f - e is at most
 * as much. One of the two always is, because f / 2 < 2^s <= 2^(12 + s) / f. A power of two is rounded down to 2^32 -
 * 1. */
typedef struct {
    uint64_t whole; /* also, floor(x / f) = x * whole >> 44 */
    uint32_t inverse, shift, more;
} Divisor;

static Divisor divisor_of[SLOTS];

__attribute__((constructor)) static void fill_divisors(void) {
    for (uint32_t f = 1; f < SLOTS; f++) {
        uint32_t shift = 31 - (uint32_t)__builtin_clz(f);
        uint64_t one = (uint64_t)1 << (32 + shift), up = (one + f - 1) / f, error = up * f - one;
        int down = up >> 32 || error * f >= (uint64_t)1 << (12 + shift);
        divisor_of[f] = (Divisor){((uint64_t)1 << 44) / f + 1, (uint32_t)(up - (uint32_t)down), shift, (uint32_t)down};
    }
}

/* What the encoder needs for a symbol: its divisor's inverse, and in `rest`, from the lowest bit, its frequency (12
 * bits), the sum of the frequencies before it (12), its divisor's shift (4), three unused bits, and `more`. */
typedef struct {
    uint32_t inverse, rest;
} Coding;

/* The same for one symbol at a time. In 64 bits, floor(x / f) = x * inverse >> 44 holds for every f, and the product
 * stays below 2^64. */
typedef struct {
    uint64_t inverse;
    uint32_t limit;
    uint16_t rest, start;
} Scalar;

INLINE uint32_t encode_one(uint32_t x, const Scalar *of, uint16_t **word) {
    uint32_t emit = x >= of->limit;
    (*word)[-1] = (uint16_t)x; /* kept only if counted */
    *word -= emit;
    x = emit ? x >> 16 : x;
    return x + (uint32_t)(x * of->inverse >> 44) * of->rest + of->start;
}

/* Encodes the first `count` symbols of a block, backwards. Returns the first word. */
INLINE uint16_t *encode_scalar(
    const uint8_t *from, int32_t count, int32_t lanes, const Scalar *of, uint32_t *state, uint16_t *word) {
    int32_t at = count;
    if (lanes == 4) {
        for (; at & 3; at--) state[(at - 1) & 3] = encode_one(state[(at - 1) & 3], &of[from[at - 1]], &word);
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        for (; at; at -= 4) {
            d = encode_one(d, &of[from[at - 1]], &word), c = encode_one(c, &of[from[at - 2]], &word);
            b = encode_one(b, &of[from[at - 3]], &word), a = encode_one(a, &of[from[at - 4]], &word);
        }
        state[0] = a, state[1] = b, state[2] = c, state[3] = d;
    }
    for (; at; at--) {
        uint32_t *x = &state[(at - 1) & (lanes - 1)];
        *x = encode_one(*x, &of[from[at - 1]], &word);
    }
    return word;
}

#if AVX2
/* For each mask of lanes that write a word: the shuffle that moves their words, by lane, to the end of 16 bytes. */
static uint8_t words_to_end[256 * 16] __attribute__((aligned(16)));

__attribute__((constructor)) static void fill_words_to_end(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 7, next = 7; lane >= 0; lane--)
            if (mask >> lane & 1) {
                words_to_end[16 * mask + 2 * next] = (uint8_t)(2 * lane);
                words_to_end[16 * mask + 2 * next-- + 1] = (uint8_t)(2 * lane + 1);
            }
}

/* Encodes whole steps of `lanes` (8, 16 or 32) symbols, backwards. Overwrites up to 8 words before the result. */
TARGET_AVX2 static uint16_t *encode_avx2(
    const uint8_t *from, int32_t steps, int32_t lanes, const Coding *of, uint32_t *state, uint16_t *word) {
    const __m256i slots = _mm256_set1_epi32(SLOTS - 1), all = _mm256_set1_epi32(SLOTS), low = _mm256_set1_epi32(0xffff);
    const __m256i shifts = _mm256_set1_epi32(15);
    int vectors_ = lanes / 8;
    __m256i x[4];
    for (int v = 0; v < vectors_; v++) x[v] = _mm256_loadu_si256((const __m256i *)(state + 8 * v));
    for (int32_t step = steps - 1; step >= 0; step--)
        for (int v = vectors_ - 1; v >= 0; v--) {
            const uint8_t *s = from + step * lanes + 8 * v;
            __m128 ab = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(of + s[0])));
            __m128 cd = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(of + s[2])));
            __m128 ef = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(of + s[4])));
            __m128 gh = _mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(of + s[6])));
            ab = _mm_loadh_pi(ab, (const __m64 *)(of + s[1])), cd = _mm_loadh_pi(cd, (const __m64 *)(of + s[3]));
            ef = _mm_loadh_pi(ef, (const __m64 *)(of + s[5])), gh = _mm_loadh_pi(gh, (const __m64 *)(of + s[7]));
            __m256 one = _mm256_insertf128_ps(_mm256_castps128_ps256(ab), ef, 1);
            __m256 two = _mm256_insertf128_ps(_mm256_castps128_ps256(cd), gh, 1);
            __m256i inverse = _mm256_castps_si256(_mm256_shuffle_ps(one, two, 0x88));
            __m256i rest = _mm256_castps_si256(_mm256_shuffle_ps(one, two, 0xdd));
            __m256i f = _mm256_and_si256(rest, slots), now = x[v];
            __m256i keep = _mm256_cmpgt_epi32(f, _mm256_srli_epi32(now, 20));
            unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(keep)) ^ 255;
            __m256i narrow = _mm256_packus_epi32(_mm256_and_si256(now, low), _mm256_setzero_si256());
            __m128i words = _mm_unpacklo_epi64(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
            words = _mm_shuffle_epi8(words, _mm_load_si128((const __m128i *)(words_to_end + 16 * mask)));
            _mm_storeu_si128((__m128i *)(word - 8), words);
            word -= __builtin_popcount(mask);
            now = _mm256_blendv_epi8(_mm256_srli_epi32(now, 16), now, keep);
            __m256i more = _mm256_add_epi32(now, _mm256_srli_epi32(rest, 31));
            __m256i even = _mm256_mul_epu32(more, inverse);
            __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(more, 32), _mm256_srli_epi64(inverse, 32));
            __m256i quotient = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
            quotient = _mm256_srlv_epi32(quotient, _mm256_and_si256(_mm256_srli_epi32(rest, 24), shifts));
            __m256i start = _mm256_and_si256(_mm256_srli_epi32(rest, 12), slots);
            x[v] = _mm256_add_epi32(_mm256_add_epi32(now, start), _mm256_mullo_epi32(quotient, _mm256_sub_epi32(all, f)));
        }
    for (int v = 0; v < vectors_; v++) _mm256_storeu_si256((__m256i *)(state + 8 * v), x[v]);
    return word;
}
#endif

/* rans.reference_encode: writes at most (8 + 4 * lanes) * blocks + 2 * size bytes to `out` and returns how many.
 * `scratch` holds 8 + BLOCK uint16. */
static int64_t encode_stream(
    const uint8_t *symbols, int64_t size, int32_t lanes, const uint16_t *frequency, uint16_t *scratch, uint8_t *out) {
#if AVX2
    Coding coding[256];
#endif
    Scalar scalar[256];
    uint32_t total = 0;
    for (int s = 0; s < 256; s++) {
        uint32_t f = frequency[s] & (SLOTS - 1), start = total & (SLOTS - 1);
        Divisor by = divisor_of[f];
#if AVX2
        coding[s] = (Coding){by.inverse, f | start << 12 | by.shift << 24 | by.more << 31};
#endif
        scalar[s] = (Scalar){by.whole, f << 20, (uint16_t)(SLOTS - f), (uint16_t)start};
        total += f;
    }
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    uint8_t *directory = out, *to = out + 4 * (blocks - 1);
    uint16_t *end = scratch + 8 + BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        const uint8_t *from = symbols + block * BLOCK;
        int32_t count = (int32_t)(size - block * BLOCK < BLOCK ? size - block * BLOCK : BLOCK);
        uint32_t state[MOST_LANES];
        uint16_t *word = end;
        for (int lane = 0; lane < lanes; lane++) state[lane] = LEAST_STATE;
#if AVX2
        if (lanes >= 8 && use_avx2()) {
            int32_t whole = count & -lanes;
            for (int32_t at = count; at > whole; at--)
                state[at - 1 - whole] = encode_one(state[at - 1 - whole], &scalar[from[at - 1]], &word);
            count = 0, word = encode_avx2(from, whole / lanes, lanes, coding, state, word);
        }
#endif
        word = encode_scalar(from, count, lanes, scalar, state, word);
        uint32_t words = (uint32_t)(end - word);
        if (block < blocks - 1) memcpy(directory + 4 * block, &words, 4);
        memcpy(to, state, 4 * (size_t)lanes), to += 4 * lanes;
        memcpy(to, word, 2 * (size_t)words), to += 2 * words;
    }
    return to - out;
}

/* rans.encode: encodes streams that follow each other in `flat`, skips those without lanes, and writes where each ends
 * in `out` to `ends`. */
EXPORT void birkhoff_rans_encode(
    const uint8_t *flat, int64_t streams, const int64_t *size, const int64_t *lanes, const uint16_t *frequency,
    uint16_t *scratch, uint8_t *out, int64_t *ends) {
    int64_t end = 0;
    for (int64_t s = 0; s < streams; flat += size[s++]) {
        if (lanes[s])
            end += encode_stream(flat, size[s], (int32_t)lanes[s], frequency + 256 * s, scratch, out + end);
        ends[s] = end;
    }
}

typedef struct {
    const uint8_t *word, *end; /* the words not yet read */
    int32_t at;                /* symbols decoded */
} Cursor;

INLINE uint32_t decode_one(uint32_t x, const uint32_t *table, const uint8_t **word, uint8_t *out) {
    uint32_t entry = table[x & (SLOTS - 1)], value = (entry >> 8 & (SLOTS - 1)) * (x >> BITS) + (entry >> 20);
    uint32_t small = value < LEAST_STATE;
    uint16_t low;
    memcpy(&low, *word, 2);
    *out = (uint8_t)entry, *word += 2 * small;
    return value << (small << 4) | (low & -small); /* without a branch, which no predictor could guess */
}

/* Decodes whole steps of four lanes while enough words are left. */
static void decode_four(Cursor *cursor, uint32_t *state, const uint32_t *table, int32_t count, uint8_t *out) {
    const uint8_t *word = cursor->word, *end = cursor->end;
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    int32_t at = cursor->at;
    for (; at + 4 <= count && end - word >= 8; at += 4) {
        a = decode_one(a, table, &word, out + at), b = decode_one(b, table, &word, out + at + 1);
        c = decode_one(c, table, &word, out + at + 2), d = decode_one(d, table, &word, out + at + 3);
    }
    state[0] = a, state[1] = b, state[2] = c, state[3] = d;
    cursor->word = word, cursor->at = at;
}

static int decode_scalar(
    Cursor *cursor, uint32_t *state, const uint32_t *table, int32_t count, int32_t lanes, uint8_t *out) {
    const uint8_t *word = cursor->word, *end = cursor->end;
    for (int32_t at = cursor->at; at < count; at++) {
        uint32_t *x = &state[at & (lanes - 1)], entry = table[*x & (SLOTS - 1)];
        uint32_t value = (entry >> 8 & (SLOTS - 1)) * (*x >> BITS) + (entry >> 20);
        out[at] = (uint8_t)entry;
        if (value < LEAST_STATE) {
            uint16_t low;
            if (word >= end) return -1;
            memcpy(&low, word, 2), word += 2;
            value = value << 16 | low;
        }
        *x = value;
    }
    cursor->word = word, cursor->at = count;
    return 0;
}

#if AVX2
/* For each mask of lanes that read a word: the number of the word that each of the eight takes. */
static uint8_t order_of_words[256 * 8];

__attribute__((constructor)) static void fill_order(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < 8; lane++)
            order_of_words[8 * mask + lane] = (uint8_t)(mask >> lane & 1 ? next++ : 0);
}

/* Returns a table's entries at eight places below 4096. This is faster than AVX2's gather, which is microcode. */
TARGET_AVX2 static inline __m256i entries_at(const uint32_t *table, __m256i places) {
    uint32_t at[8] __attribute__((aligned(32)));
    _mm256_store_si256((__m256i *)at, places);
    __m128i a = _mm_unpacklo_epi32(_mm_cvtsi32_si128((int)table[at[0]]), _mm_cvtsi32_si128((int)table[at[1]]));
    __m128i b = _mm_unpacklo_epi32(_mm_cvtsi32_si128((int)table[at[2]]), _mm_cvtsi32_si128((int)table[at[3]]));
    __m128i c = _mm_unpacklo_epi32(_mm_cvtsi32_si128((int)table[at[4]]), _mm_cvtsi32_si128((int)table[at[5]]));
    __m128i d = _mm_unpacklo_epi32(_mm_cvtsi32_si128((int)table[at[6]]), _mm_cvtsi32_si128((int)table[at[7]]));
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

#define STEP(x, symbol)                                                                                                \
    do {                                                                                                               \
        __m256i entry = entries_at(table, _mm256_and_si256(x, slots));                                                 \
        symbol = _mm256_and_si256(entry, bytes);                                                                       \
        x = _mm256_add_epi32(_mm256_mullo_epi32(_mm256_and_si256(_mm256_srli_epi32(entry, 8), slots),                  \
                                                _mm256_srli_epi32(x, BITS)),                                           \
                             _mm256_srli_epi32(entry, 20));                                                            \
        __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), zero);                                              \
        unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(low));                                        \
        __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)word));                                 \
        __m256i which = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(order + 8 * mask)));                    \
        words = _mm256_permutevar8x32_epi32(words, which);                                                             \
        x = _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), words), low);                              \
        word += 2 * __builtin_popcount(mask);                                                                          \
    } while (0)

TARGET_AVX2 static void decode_avx2(
    Cursor *cursor, uint32_t *state, const uint32_t *table, int32_t count, int32_t lanes, uint8_t *out) {
    const __m256i slots = _mm256_set1_epi32(SLOTS - 1), bytes = _mm256_set1_epi32(255), zero = _mm256_setzero_si256();
    const uint8_t *word = cursor->word, *end = cursor->end, *order = order_of_words;
    int32_t at = 0;
    __m256i x[4], s[4];
    if (lanes == 32) {
        const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        for (int v = 0; v < 4; v++) x[v] = _mm256_loadu_si256((const __m256i *)(state + 8 * v));
        for (; at + 32 <= count && end - word >= 80; at += 32) {
            STEP(x[0], s[0]);
            STEP(x[1], s[1]);
            STEP(x[2], s[2]);
            STEP(x[3], s[3]);
            __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(s[0], s[1]), _mm256_packus_epi32(s[2], s[3]));
            _mm256_storeu_si256((__m256i *)(out + at), _mm256_permutevar8x32_epi32(packed, places));
        }
        for (int v = 0; v < 4; v++) _mm256_storeu_si256((__m256i *)(state + 8 * v), x[v]);
    } else { /* 8 or 16 */
        int vs = lanes / 8;
        for (int v = 0; v < vs; v++) x[v] = _mm256_loadu_si256((const __m256i *)(state + 8 * v));
        for (; at + lanes <= count && end - word >= 48; at += lanes)
            for (int v = 0; v < vs; v++) {
                STEP(x[v], s[v]);
                __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(s[v], zero), zero);
                uint32_t fours[2] = {(uint32_t)_mm256_extract_epi32(packed, 0), (uint32_t)_mm256_extract_epi32(packed, 4)};
                memcpy(out + at + 8 * v, fours, 8);
            }
        for (int v = 0; v < vs; v++) _mm256_storeu_si256((__m256i *)(state + 8 * v), x[v]);
    }
    cursor->word = word, cursor->at = at;
}
#endif

/* rans.decode: returns 0, or -1 if the bytes are not a valid code. `data` is everything after the table. */
EXPORT int32_t birkhoff_rans_decode(
    const uint8_t *data, int64_t size, int64_t symbols, int32_t lanes, const uint16_t *frequency, uint8_t *out) {
    uint32_t table[SLOTS];
    uint32_t slot = 0;
    for (uint32_t s = 0; s < 256; s++)
        for (uint32_t bias = 0; bias < frequency[s]; bias++) {
            if (slot >= SLOTS) return -1;
            table[slot++] = s | (uint32_t)frequency[s] << 8 | bias << 20;
        }
    if (slot != SLOTS) return -1;
    int64_t blocks = (symbols + BLOCK - 1) / BLOCK;
    if (size < 4 * (blocks - 1)) return -1;
    const uint8_t *from = data + 4 * (blocks - 1), *all = data + size;
    for (int64_t block = 0; block < blocks; block++) {
        int32_t count = (int32_t)(symbols - block * BLOCK < BLOCK ? symbols - block * BLOCK : BLOCK);
        uint32_t state[MOST_LANES], words;
        if (all - from < 4 * lanes) return -1;
        memcpy(state, from, 4 * (size_t)lanes), from += 4 * lanes;
        for (int lane = 0; lane < lanes; lane++)
            if (state[lane] < LEAST_STATE) return -1;
        if (block < blocks - 1)
            memcpy(&words, data + 4 * block, 4);
        else if ((all - from) & 1)
            return -1;
        else
            words = (uint32_t)((all - from) / 2 <= count ? (all - from) / 2 : count);
        if (words > (uint32_t)count || all - from < 2 * (int64_t)words) return -1;
        Cursor cursor = {from, from + 2 * (size_t)words, 0};
#if AVX2
        if (lanes >= 8 && use_avx2()) decode_avx2(&cursor, state, table, count, lanes, out);
#endif
        if (lanes == 4) decode_four(&cursor, state, table, count, out);
        if (decode_scalar(&cursor, state, table, count, lanes, out) || cursor.word != cursor.end) return -1;
        for (int lane = 0; lane < lanes; lane++)
            if (state[lane] != LEAST_STATE) return -1;
        from = cursor.end, out += count;
    }
    return from == all ? 0 : -1;
}

/* rest.plan: writes instructions for decoding many blocks at once. The streams [count] include their first byte, the
 * kind, and have `size` > 0 symbols each. The output is their frequencies [count][256], zeros for raw streams, and a
 * row of seven for each block: place of its states (of its bytes, if raw), words (bytes), place of its symbols,
 * symbols, stream, lanes (0: raw), 0. Places count from the stream's `source` and `target`. Returns the number of
 * rows, or -1 - s for the first damaged stream s. */
EXPORT int64_t birkhoff_rans_plan(
    int64_t count, const int64_t *address, const int64_t *length, const int64_t *size, const int64_t *source,
    const int64_t *target, uint16_t *frequency, int64_t *rows) {
    int64_t found = 0;
    for (int64_t s = 0; s < count; s++, frequency += 256) {
        const uint8_t *data = (const uint8_t *)(uintptr_t)address[s];
        int64_t left = length[s], blocks = (size[s] + BLOCK - 1) / BLOCK, at, lanes = 0;
        memset(frequency, 0, 256 * sizeof *frequency);
        if (left < 1) return -1 - s;
        if (data[0] == 0) {
            if (left - 1 != size[s]) return -1 - s;
            at = 1;
        } else {
            if (data[0] != 2 || left < 2 || data[1] > 5) return -1 - s;
            int32_t used = birkhoff_table_parse(data + 2, left - 2, frequency);
            if (used < 0) return -1 - s;
            at = 2 + used, lanes = 1 << data[1];
            if (left - at < 4 * (blocks - 1)) return -1 - s;
        }
        const uint8_t *directory = data + at;
        if (lanes) at += 4 * (blocks - 1);
        for (int64_t block = 0; block < blocks; block++, found++) {
            int64_t symbols = size[s] - block * BLOCK < BLOCK ? size[s] - block * BLOCK : BLOCK, words = symbols;
            if (lanes) {
                if (left - at < 4 * lanes) return -1 - s;
                words = left - at - 4 * lanes;
                if (block < blocks - 1) {
                    uint32_t stored;
                    memcpy(&stored, directory + 4 * block, 4);
                    if (stored > (uint64_t)words / 2) return -1 - s;
                    words = stored;
                } else {
                    if (words & 1) return -1 - s;
                    words /= 2;
                }
                if (words > symbols) return -1 - s;
            }
            int64_t row[7] = {source[s] + at, words, target[s] + block * BLOCK, symbols, s, lanes, 0};
            memcpy(rows + 7 * found, row, sizeof row);
            at += lanes ? 4 * lanes + 2 * words : words;
        }
        if (at != left) return -1 - s;
    }
    return found;
}

/* rest.unpack_all: writes the symbols of streams that are raw or coded by a table, each with `size` > 0, one after the
 * other. Returns how many streams precede the first damaged one. */
EXPORT int64_t birkhoff_group_symbols(
    int64_t count, const int64_t *address, const int64_t *length, const int64_t *size, uint8_t *out) {
    for (int64_t s = 0; s < count; out += size[s++]) {
        const uint8_t *data = (const uint8_t *)(uintptr_t)address[s];
        uint16_t frequency[256];
        if (length[s] < 1) return s;
        if (data[0] == 0) {
            if (length[s] - 1 != size[s]) return s;
            memcpy(out, data + 1, (size_t)size[s]);
            continue;
        }
        if (data[0] != 2 || length[s] < 2 || data[1] > 5) return s;
        int32_t used = birkhoff_table_parse(data + 2, length[s] - 2, frequency);
        if (used < 0) return s;
        if (birkhoff_rans_decode(data + 2 + used, length[s] - 2 - used, size[s], 1 << data[1], frequency, out)) return s;
    }
    return count;
}

/* --- groups: contexts.py ----------------------------------------------------------------------------------------- */

#define SORTED 4 /* rows whose columns are reordered together */

/* to[k][c] = from[k][order[c]], in stores of four bytes, because a core can store less often than load. */
INLINE void reordered(const uint8_t *const from[SORTED], const uint32_t *order, int64_t columns, uint8_t *const to[SORTED]) {
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4) {
        uint32_t a = order[column], b = order[column + 1], c = order[column + 2], d = order[column + 3];
        for (int k = 0; k < SORTED; k++) {
            const uint8_t *x = from[k];
            uint32_t four = x[a] | (uint32_t)x[b] << 8 | (uint32_t)x[c] << 16 | (uint32_t)x[d] << 24;
            memcpy(to[k] + column, &four, 4);
        }
    }
    for (; column < columns; column++)
        for (int k = 0; k < SORTED; k++) to[k][column] = from[k][order[column]];
}

/* contexts.gather (with `into`) and contexts.join: move the symbols between a plane [R, C] and its groups, which follow
 * each other, by the tables of birkhoff_addresses. `order` holds C uint32, `scratch` SORTED * C bytes. */
EXPORT void birkhoff_regroup(
    uint8_t *plane, int64_t rows, int64_t columns, uint8_t *groups, const int64_t *of_row, const int64_t *of_column,
    const int64_t *base, const int64_t *width, uint32_t *order, uint8_t *scratch, int32_t into) {
    int64_t starts[64], start = 0;
    int32_t used[64], levels = 0;
    for (int32_t level = 0; level < 64; start += width[level++]) {
        starts[level] = start;
        if (width[level]) used[levels++] = level;
    }
    for (int64_t column = 0; column < columns; column++) { /* its place among the columns sorted by level */
        int64_t place = starts[of_column[column] & 63] + (of_column[column] >> 6);
        if (into)
            order[place] = (uint32_t)column;
        else
            order[column] = (uint32_t)place;
    }
    for (int64_t row = 0; row < rows; row += SORTED) {
        int64_t height = rows - row < SORTED ? rows - row : SORTED;
        uint8_t *line[SORTED], *sorted[SORTED];
        for (int64_t k = 0; k < SORTED; k++) {
            line[k] = plane + (row + (k < height ? k : 0)) * columns; /* repeat the first row if there are fewer */
            sorted[k] = scratch + (k < height ? k : 0) * columns;
        }
        if (into) reordered((const uint8_t *const *)line, order, columns, sorted);
        for (int64_t k = 0; k < height; k++) {
            int64_t rank = of_row[row + k] >> 6;
            const int64_t *first = base + 64 * (of_row[row + k] & 63);
            uint8_t *at = sorted[k];
            for (int32_t l = 0; l < levels; l++) {
                int64_t size = width[used[l]];
                uint8_t *place = groups + first[used[l]] + rank * size;
                if (into)
                    memcpy(place, at, (size_t)size);
                else
                    memcpy(at, place, (size_t)size);
                at += size;
            }
        }
        if (!into) reordered((const uint8_t *const *)sorted, order, columns, line);
    }
}

/* planes.symbols_of: writes the coordinates [R, P] of both planes as symbols + 128, [R, 2P]. */
EXPORT void birkhoff_symbols(const int8_t *i, const int8_t *j, int64_t rows, int64_t pairs, int32_t shift, uint8_t *out) {
    for (int64_t row = 0; row < rows; row++)
        for (int plane = 0; plane < 2; plane++) {
            const int8_t *restrict from = (plane ? j : i) + row * pairs;
            uint8_t *restrict to = out + (2 * row + plane) * pairs;
            if (shift)
                for (int64_t p = 0; p < pairs; p++) to[p] = (uint8_t)((uint8_t)(from[p] >> 1) ^ 128);
            else
                for (int64_t p = 0; p < pairs; p++) to[p] = (uint8_t)((uint8_t)from[p] ^ 128);
        }
}

/* contexts.addresses: writes tables that give each symbol's number in the groups, as a sum of entries looked up by row
 * and by column. An entry of `of_row` [rows] and `of_column` [columns] is 64 * rank + level. `base` is [64][64],
 * `width` [64]; `sizes` [64] are those of the groups. Returns the number of groups. If `row_level` is null, all rows
 * have level 0, and `of_row` is not written. */
EXPORT int32_t birkhoff_addresses(
    const uint8_t *row_level, int64_t rows, const uint8_t *column_level, int64_t columns, int64_t least, int32_t most,
    int64_t *of_row, int64_t *of_column, int64_t *base, int64_t *width, int64_t *sizes) {
    int64_t height[64] = {0}, sums[127] = {0}, left = rows * columns, start = 0;
    int32_t group_of[127], group = 0, greatest = 0;
    memset(width, 0, 64 * sizeof *width), memset(base, 0, 64 * 64 * sizeof *base), memset(sizes, 0, 64 * sizeof *sizes);
    if (row_level)
        for (int64_t row = 0; row < rows; row++) of_row[row] = height[row_level[row] & 63]++ << 6 | (row_level[row] & 63);
    else
        height[0] = rows;
    for (int64_t column = 0; column < columns; column++)
        of_column[column] = width[column_level[column] & 63]++ << 6 | (column_level[column] & 63);
    for (int a = 0; a < 64; a++)
        for (int b = 0; b < 64; b++) {
            sums[a + b] += height[a] * width[b];
            if (height[a] && width[b] && a + b > greatest) greatest = a + b;
        }
    int64_t held = 0;
    for (int sum = 0; sum <= greatest; sum++) {
        group_of[sum] = group, sizes[group] += sums[sum];
        held += sums[sum], left -= sums[sum];
        if (held >= least && left >= least && group < most - 1) group++, held = 0;
    }
    int64_t at[64];
    for (int32_t g = 0; g <= group; g++) at[g] = start, start += sizes[g];
    for (int a = 0; a < 64; a++)
        for (int b = 0; b < 64; b++)
            if (height[a] && width[b]) base[64 * a + b] = at[group_of[a + b]], at[group_of[a + b]] += height[a] * width[b];
    return group + 1;
}

/* contexts.mean_squares: writes exact sums of (symbol - 128)^2 for a plane's rows and columns. */
INLINE void squares_of(const uint8_t *plane, int64_t rows, int64_t columns, int64_t *by_row, int64_t *by_column) {
    memset(by_column, 0, (size_t)columns * sizeof *by_column);
    for (int64_t left = 0; left < columns; left += 1024) {
        int64_t width = columns - left < 1024 ? columns - left : 1024;
        for (int64_t top = 0; top < rows; top += 1 << 16) {
            int64_t bottom = rows - top < 1 << 16 ? rows : top + (1 << 16);
            uint32_t sums[1024] = {0}; /* 2^14 * 2^16 fits */
            for (int64_t row = top; row < bottom; row++) {
                const uint8_t *line = plane + row * columns + left;
                uint32_t sum = 0;
                for (int64_t column = 0; column < width; column++) {
                    int32_t n = line[column] - 128;
                    uint32_t square = (uint32_t)(n * n);
                    sum += square, sums[column] += square;
                }
                by_row[row] = (left ? by_row[row] : 0) + sum;
            }
            for (int64_t column = 0; column < width; column++) by_column[left + column] += sums[column];
        }
    }
}

TARGET_AVX2 static void squares_avx2(const uint8_t *p, int64_t r, int64_t c, int64_t *by_row, int64_t *by_column) {
    squares_of(p, r, c, by_row, by_column);
}

EXPORT void birkhoff_squares(const uint8_t *plane, int64_t rows, int64_t columns, int64_t *by_row, int64_t *by_column) {
    (use_avx2() ? squares_avx2 : squares_of)(plane, rows, columns, by_row, by_column);
}

/* --- paths of the trellis: trellis.py ------------------------------------------------------------------------- */

#define WIDE 8
typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE)));

#define SPLAT_F(x) ((Floats){x, x, x, x, x, x, x, x})
#define SPLAT_I(x) ((Ints){x, x, x, x, x, x, x, x})

INLINE Floats rounded(Floats x) { /* to nearest, ties to even, for |x| < 2^22 */
    const Floats magic = SPLAT_F(12582912.0f);
    return (x + magic) - magic;
}

INLINE Floats chosen(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

INLINE Floats loaded(const float *from, int64_t width) {
    Floats x = SPLAT_F(0.0f);
    if (width >= WIDE)
        memcpy(&x, from, sizeof x);
    else if (width > 0)
        memcpy(&x, from, 4 * (size_t)width);
    return x;
}

/* Finds the best paths of up to WIDE lanes from `first`. `taken` holds WIDE int32 for each step. */
INLINE void viterbi_of(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    int64_t steps = (size + lanes - 1) / lanes, width = lanes - first < WIDE ? lanes - first : WIDE;
    const Floats far = SPLAT_F(1e9f), quarter = SPLAT_F(0.25f);
    Floats m[8] = {SPLAT_F(0.0f), far, far, far, far, far, far, far};
    for (int64_t t = 0; t < steps; t++) {
        int64_t left = size - t * lanes - first; /* a lane that has ended reads zeros */
        Floats x = loaded(u + t * lanes + first, left < width ? left : width), d[4], next[8];
        Ints bits = SPLAT_I(0);
        for (int c = 0; c < 4; c++) {
            Floats y = (x - SPLAT_F((float)c)) * quarter;
            y = y - rounded(y);
            d[c] = y * y;
        }
        for (int q = 0; q < 4; q++)
            for (int o = 0; o < 2; o++) {
                Floats low = m[q] + d[q ^ 2 * o], high = m[q + 4] + d[q ^ 2 ^ 2 * o];
                Ints mask = high < low;
                next[2 * q + o] = chosen(mask, high, low);
                bits |= mask & SPLAT_I(1 << (2 * q + o));
            }
        for (int s = 0; s < 8; s++) m[s] = next[s];
        memcpy(taken + t * WIDE, &bits, sizeof bits);
    }
    Ints state = SPLAT_I(0);
    Floats least = m[0];
    for (int s = 1; s < 8; s++) {
        Ints mask = m[s] < least;
        least = chosen(mask, m[s], least);
        state = (SPLAT_I(s) & mask) | (state & ~mask);
    }
    for (int64_t t = steps - 1; t >= 0; t--) {
        Ints bits;
        memcpy(&bits, taken + t * WIDE, sizeof bits);
        Ints before = (state >> 1) + (((bits >> state) & 1) << 2);
        Ints subset = (state >> 1) ^ (((state ^ (before >> 2)) & 1) << 1);
        int64_t left = size - t * lanes - first, count = left < width ? left : width;
        float *place = u + t * lanes + first;
        Floats c = __builtin_convertvector(subset, Floats);
        Floats n = rounded((loaded(place, count) - c) * quarter) * SPLAT_F(4.0f) + c;
        if (count >= WIDE)
            memcpy(place, &n, sizeof n);
        else if (count > 0)
            memcpy(place, &n, 4 * (size_t)count);
        state = before;
    }
}

#if AVX2
/* Of the two ways to a state 2q + o, keeps the smaller metric, and notes whether it comes from q + 4. */
#define NEARER(to, bit, low, high)                                                                                     \
    do {                                                                                                               \
        __m256 a = (low), b = (high);                                                                                  \
        bits = _mm256_or_ps(bits, _mm256_and_ps(_mm256_cmp_ps(b, a, _CMP_LT_OQ), bit));                                \
        to = _mm256_min_ps(b, a);                                                                                      \
    } while (0)

#define NEAREST_EVEN (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

TARGET_AVX2 static inline __m256 square_distance(__m256 x, float subset) { /* to the numbers of a subset, in quarters */
    __m256 y = _mm256_mul_ps(_mm256_sub_ps(x, _mm256_set1_ps(subset)), _mm256_set1_ps(0.25f));
    y = _mm256_sub_ps(y, _mm256_round_ps(y, NEAREST_EVEN));
    return _mm256_mul_ps(y, y);
}

TARGET_AVX2 static void viterbi_avx2(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    if (lanes - first < WIDE) {
        viterbi_of(u, size, lanes, first, taken);
        return;
    }
    int64_t steps = (size + lanes - 1) / lanes, last = size - (steps - 1) * lanes - first; /* lanes in the last step */
    const __m256 far = _mm256_set1_ps(1e9f), quarter = _mm256_set1_ps(0.25f);
    __m256 bit[8];
    for (int s = 0; s < 8; s++) bit[s] = _mm256_castsi256_ps(_mm256_set1_epi32(1 << s));
    __m256 m0 = _mm256_setzero_ps(), m1 = far, m2 = far, m3 = far, m4 = far, m5 = far, m6 = far, m7 = far;
    float *place = u + first, ends[WIDE];
    for (int64_t t = 0; t < steps; t++, place += lanes) {
        __m256 x, bits = _mm256_setzero_ps();
        if (t == steps - 1 && last < WIDE) {
            Floats padded = loaded(place, last);
            memcpy(ends, &padded, sizeof ends), x = _mm256_loadu_ps(ends);
        } else
            x = _mm256_loadu_ps(place);
        __m256 d = square_distance(x, 0), e = square_distance(x, 2), n0, n1, n2, n3, n4, n5, n6, n7;
        NEARER(n0, bit[0], _mm256_add_ps(m0, d), _mm256_add_ps(m4, e));
        NEARER(n1, bit[1], _mm256_add_ps(m0, e), _mm256_add_ps(m4, d));
        NEARER(n4, bit[4], _mm256_add_ps(m2, e), _mm256_add_ps(m6, d));
        NEARER(n5, bit[5], _mm256_add_ps(m2, d), _mm256_add_ps(m6, e));
        d = square_distance(x, 1), e = square_distance(x, 3);
        NEARER(n2, bit[2], _mm256_add_ps(m1, d), _mm256_add_ps(m5, e));
        NEARER(n3, bit[3], _mm256_add_ps(m1, e), _mm256_add_ps(m5, d));
        NEARER(n6, bit[6], _mm256_add_ps(m3, e), _mm256_add_ps(m7, d));
        NEARER(n7, bit[7], _mm256_add_ps(m3, d), _mm256_add_ps(m7, e));
        m0 = n0, m1 = n1, m2 = n2, m3 = n3, m4 = n4, m5 = n5, m6 = n6, m7 = n7;
        _mm256_storeu_ps((float *)(taken + t * WIDE), bits);
    }
    __m256 least = m0, m[8] = {m0, m1, m2, m3, m4, m5, m6, m7}, best = _mm256_setzero_ps();
    for (int s = 1; s < 8; s++) {
        __m256 mask = _mm256_cmp_ps(m[s], least, _CMP_LT_OQ);
        least = _mm256_min_ps(m[s], least);
        best = _mm256_blendv_ps(best, _mm256_castsi256_ps(_mm256_set1_epi32(s)), mask);
    }
    __m256i state = _mm256_castps_si256(best), one = _mm256_set1_epi32(1);
    for (int64_t t = steps - 1; t >= 0; t--) {
        place -= lanes;
        __m256i bits = _mm256_loadu_si256((const __m256i *)(taken + t * WIDE));
        __m256i high = _mm256_and_si256(_mm256_srlv_epi32(bits, state), one), half = _mm256_srli_epi32(state, 1);
        /* the subset: half of the state, with 2 added or subtracted if its lowest bit is not `high` */
        __m256i odd = _mm256_and_si256(_mm256_xor_si256(state, high), one);
        __m256 c = _mm256_cvtepi32_ps(_mm256_xor_si256(half, _mm256_add_epi32(odd, odd)));
        int ends_here = t == steps - 1 && last < WIDE;
        __m256 n = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(ends_here ? ends : place), c), quarter);
        n = _mm256_add_ps(_mm256_mul_ps(_mm256_round_ps(n, NEAREST_EVEN), _mm256_set1_ps(4.0f)), c);
        _mm256_storeu_ps(ends_here ? ends : place, n);
        if (ends_here && last > 0) memcpy(place, ends, 4 * (size_t)last);
        state = _mm256_add_epi32(half, _mm256_slli_epi32(high, 2));
    }
}
#else
#define viterbi_avx2 viterbi_base
#endif

static void viterbi_base(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    viterbi_of(u, size, lanes, first, taken);
}

/* trellis.search_: searches in place. `scratch` holds 8 int32 for each step. */
EXPORT void birkhoff_viterbi(float *u, int64_t size, int64_t lanes, int32_t *scratch) {
    void (*search)(float *, int64_t, int64_t, int64_t, int32_t *) = use_avx2() ? viterbi_avx2 : viterbi_base;
    for (int64_t first = 0; first < lanes; first += WIDE) search(u, size, lanes, first, scratch);
}

/* --- feedback between rows: output.rows ------------------------------------------------------------------------ */

/* u - e * factors, for places first..size-1. */
INLINE void lose(float *restrict u, const float *restrict factors, float e, int64_t first, int64_t size) {
    for (int64_t s = first; s < size; s++) u[s] -= factors[s] * e;
}

/* Take the errors of rows first..last-1 from all rows after them, four at a time so that u is read less often. */
INLINE void lose_all(float *restrict u, const float *upper, const float *e, int64_t first, int64_t last, int64_t rows) {
    int64_t r = first;
    for (; r + 4 <= last; r += 4) {
        const float *restrict a = upper + r * rows, *restrict b = a + rows, *restrict c = b + rows, *restrict d = c + rows;
        const float p = e[r], q = e[r + 1], v = e[r + 2], w = e[r + 3];
        for (int64_t s = last; s < rows; s++) u[s] = u[s] - a[s] * p - b[s] * q - c[s] * v - d[s] * w;
    }
    for (; r < last; r++) lose(u, upper + r * rows, e[r], last, rows);
}

#define ROWS_BLOCK 32

INLINE void rounded_rows(float *u, float *n, const float *upper, int64_t rows, float *e) {
    for (int64_t first = 0; first < rows; first += ROWS_BLOCK) {
        int64_t last = first + ROWS_BLOCK < rows ? first + ROWS_BLOCK : rows;
        for (int64_t r = first; r < last; r++) {
            n[r] = __builtin_rintf(u[r]);
            e[r] = (u[r] - n[r]) / upper[r * rows + r];
            lose(u, upper + r * rows, e[r], r + 1, last);
        }
        lose_all(u, upper, e, first, last, rows);
    }
}

/* The best path of one lane, rows first..first+steps-1: each of eight survivors has targets of its own. `scratch` holds
 * 32 floats and 8 bytes for each step. */
INLINE void path_in_rows(
    const float *u, float *n, const float *upper, int64_t rows, int64_t first, int64_t steps, float *e, float *scratch) {
    float *was = scratch, *now = was + 8 * steps, *numbers = now + 8 * steps, *errors = numbers + 8 * steps;
    uint8_t *before = (uint8_t *)(errors + 8 * steps);
    float metric[8] = {0, 1e30f, 1e30f, 1e30f, 1e30f, 1e30f, 1e30f, 1e30f};
    for (int s = 0; s < 8; s++) memcpy(was + s * steps, u + first, sizeof(float) * (size_t)steps);
    for (int64_t t = 0; t < steps; t++) {
        const float *factors = upper + (first + t) * rows + first;
        const float pivot = factors[t];
        float next[8];
        for (int to = 0; to < 8; to++) {
            float least = 0, number = 0, error = 0;
            int from = 0;
            for (int high = 0; high < 2; high++) {
                int q = to >> 1, s = q + 4 * high, c = (to & 1) == high ? q : q ^ 2;
                float x = was[s * steps + t], near = __builtin_rintf((x - (float)c) * 0.25f) * 4.0f + (float)c;
                float lost = (x - near) / pivot, sum = metric[s] + lost * lost;
                if (!high || sum < least) least = sum, number = near, error = lost, from = s;
            }
            next[to] = least, numbers[8 * t + to] = number, errors[8 * t + to] = error;
            before[8 * t + to] = (uint8_t)from;
            float *restrict carried = now + to * steps;
            const float *restrict held = was + from * steps;
            for (int64_t s = t + 1; s < steps; s++) carried[s] = held[s] - factors[s] * error;
        }
        memcpy(metric, next, sizeof metric);
        float *other = was;
        was = now, now = other;
    }
    int state = 0;
    for (int s = 1; s < 8; s++)
        if (metric[s] < metric[state]) state = s;
    for (int64_t t = steps - 1; t >= 0; t--) {
        n[first + t] = numbers[8 * t + state], e[first + t] = errors[8 * t + state];
        state = before[8 * t + state];
    }
}

INLINE void rows_of(
    float *u, float *n, const float *upper, int64_t rows, int64_t lanes, const int64_t *steps, float *scratch) {
    if (!lanes) rounded_rows(u, n, upper, rows, scratch);
    for (int64_t lane = 0, first = 0; lane < lanes; first += steps[lane++]) {
        path_in_rows(u, n, upper, rows, first, steps[lane], scratch, scratch + rows);
        lose_all(u, upper, scratch, first, first + steps[lane], rows);
    }
}

#if AVX2
TARGET_AVX2 static void rows_avx2(
    float *u, float *n, const float *upper, int64_t rows, int64_t lanes, const int64_t *steps, float *scratch) {
    rows_of(u, n, upper, rows, lanes, steps, scratch);
}
#else
#define rows_avx2 rows_base
#endif

static void rows_base(
    float *u, float *n, const float *upper, int64_t rows, int64_t lanes, const int64_t *steps, float *scratch) {
    rows_of(u, n, upper, rows, lanes, steps, scratch);
}

/* output.rows.round_rows: overwrites u. `scratch` holds `rows` floats, and 34 more for each step of the longest lane.
 * Returns 0 if the lanes' steps are not all rows. */
EXPORT int32_t birkhoff_round_rows(
    float *u, float *n, const float *upper, int64_t rows, int64_t lanes, const int64_t *steps, float *scratch) {
    int64_t left = rows;
    for (int64_t lane = 0; lane < lanes; lane++) {
        if (steps[lane] < 0 || steps[lane] > left) return 0;
        left -= steps[lane];
    }
    if (lanes && left) return 0;
    (use_avx2() ? rows_avx2 : rows_base)(u, n, upper, rows, lanes, steps, scratch);
    return 1;
}

#define SIDE 16 /* lanes searched at a time: their weights share a cache line */

/* Bytes of scratch per step for SIDE lanes: their values, and the decisions of WIDE of them. */
#define PATH_SCRATCH (2 * SIDE * sizeof(float) + WIDE * sizeof(int32_t))

/* Where pairs p, p + 1, ... of a row are: the places of pair p's first and second weight, the number of pairs that are
 * consecutive from there, and how many of these have a second weight. */
typedef struct {
    int64_t x, y, run, seconds;
} Place;

INLINE Place place_of(int64_t pair, int64_t columns) {
    int64_t full = columns / 64, block = pair / 32, k = pair % 32;
    if (block < full) return (Place){64 * block + k, 64 * block + 32 + k, 32 - k, 32 - k};
    int64_t width = columns - 64 * full, half = (width + 1) / 2;
    return (Place){64 * full + k, 64 * full + half + k, half - k, width - half - k};
}

/* lattice.quantise_path: writes the coordinates of up to SIDE lanes from `first`, whole numbers [steps, SIDE] each. */
INLINE void path_of(
    const float *weight, int64_t size, int64_t columns, float inverse, int64_t lanes, int64_t first, int64_t steps,
    float *x, float *y, int32_t *taken, void (*search)(float *, int64_t, int64_t, int64_t, int32_t *)) {
    int64_t pairs = (columns + 1) / 2, width = lanes - first < SIDE ? lanes - first : SIDE;
    const Floats by = SPLAT_F(inverse), shear = SPLAT_F(1.0f / 256);
    const float *end = weight + size / pairs * columns;
    int64_t row = first / pairs, pair = first % pairs, rows_on = lanes / pairs, pairs_on = lanes % pairs;
    for (int64_t t = 0; t < steps; t++) {
        int64_t left = size - t * lanes - first, count = left < width ? left : width, r = row, p = pair;
        float *to_x = x + t * SIDE, *to_y = y + t * SIDE;
        for (int64_t done = 0; done < count;) {
            Place at = place_of(p, columns);
            const float *from = weight + r * columns + at.x, *other = weight + r * columns + at.y;
            int64_t run = at.run < count - done ? at.run : count - done;
            if (at.seconds >= run && end - other >= SIDE) { /* values copied beyond the run are overwritten later */
                for (int k = 0; k < SIDE; k += WIDE) {
                    Floats a = loaded(from + k, WIDE) * by, b = loaded(other + k, WIDE) * by;
                    memcpy(to_x + done + k, &a, sizeof a), memcpy(to_y + done + k, &b, sizeof b);
                }
                const float *next = from + (at.run == SIDE ? 3 * SIDE : SIDE); /* for the next lanes */
                __builtin_prefetch(next), __builtin_prefetch(next + 32);
            } else
                for (int64_t k = 0; k < run; k++) {
                    to_x[done + k] = from[k] * inverse;
                    to_y[done + k] = k < at.seconds ? other[k] * inverse : 0.0f;
                }
            done += run, p += run;
            if (p == pairs) p = 0, r++;
        }
        for (int64_t k = count > 0 ? count : 0; k < SIDE; k++) to_x[k] = to_y[k] = 0.0f;
        row += rows_on, pair += pairs_on;
        if (pair >= pairs) pair -= pairs, row++;
    }
    int64_t both = width > WIDE;
    search(y, steps * SIDE, SIDE, 0, taken);
    if (both) search(y, steps * SIDE, SIDE, WIDE, taken);
    for (int64_t k = 0; k < steps * SIDE; k += WIDE) {
        Floats a = loaded(x + k, WIDE) - loaded(y + k, WIDE) * shear;
        memcpy(x + k, &a, sizeof a);
    }
    for (int64_t k = size - (steps - 1) * lanes - first; k < SIDE; k++) /* a lane that has ended reads zeros */
        if (k >= 0) x[(steps - 1) * SIDE + k] = 0.0f;
    search(x, steps * SIDE, SIDE, 0, taken);
    if (both) search(x, steps * SIDE, SIDE, WIDE, taken);
}

/* A list of the pairs with a coordinate outside -128..127. */
typedef struct {
    int64_t *index;
    int32_t *wide;
    int64_t room, found;
} Outside;

/* Stores a step's coordinates: `count` of each plane, up to SIDE. */
static void step_stored(const float *x, const float *y, int64_t flat, int64_t count, int8_t *i, int8_t *j, Outside *outside) {
    for (int64_t k = 0; k < count; k++) {
        int32_t a = (int32_t)x[k], b = (int32_t)y[k], far = ((a + 128) | (b + 128)) & ~255;
        i[flat + k] = (int8_t)(far ? 0 : a), j[flat + k] = (int8_t)(far ? 0 : b);
        if (!far) continue;
        if (outside->found < outside->room) {
            outside->index[outside->found] = flat + k;
            outside->wide[2 * outside->found] = a, outside->wide[2 * outside->found + 1] = b;
        }
        outside->found++;
    }
}

#if AVX2
/* The same for exactly SIDE. Stores nothing and returns 0 if one is outside. */
TARGET_AVX2 static int side_stored_avx2(const float *x, const float *y, int8_t *i, int8_t *j) {
    const __m256 half = _mm256_set1_ps(0.5f), most = _mm256_set1_ps(127.75f), size = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256 v[4] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(y), _mm256_loadu_ps(y + 8)};
    __m256 far = _mm256_andnot_ps(size, _mm256_add_ps(v[0], half)); /* |n + 1/2| is at most 127.5 for a byte */
    for (int k = 1; k < 4; k++) far = _mm256_max_ps(far, _mm256_andnot_ps(size, _mm256_add_ps(v[k], half)));
    if (_mm256_movemask_ps(_mm256_cmp_ps(far, most, _CMP_GT_OQ))) return 0;
    __m256i a = _mm256_packs_epi32(_mm256_cvttps_epi32(v[0]), _mm256_cvttps_epi32(v[1]));
    __m256i b = _mm256_packs_epi32(_mm256_cvttps_epi32(v[2]), _mm256_cvttps_epi32(v[3]));
    __m256i both = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order);
    _mm_storeu_si128((__m128i *)i, _mm256_castsi256_si128(both));
    _mm_storeu_si128((__m128i *)j, _mm256_extracti128_si256(both, 1));
    return 1;
}
#endif

INLINE void paths_of(
    const float *weight, int64_t rows, int64_t columns, float inverse, int64_t lanes, void *scratch, int8_t *i, int8_t *j,
    Outside *outside, void (*search)(float *, int64_t, int64_t, int64_t, int32_t *),
    int (*side_stored)(const float *, const float *, int8_t *, int8_t *)) {
    int64_t size = rows * ((columns + 1) / 2), steps = (size + lanes - 1) / lanes;
    float *x = scratch, *y = x + (steps + 1) * SIDE;
    int32_t *taken = (int32_t *)(y + (steps + 1) * SIDE);
    for (int64_t first = 0; first < lanes; first += SIDE) {
        int64_t width = lanes - first < SIDE ? lanes - first : SIDE;
        path_of(weight, size, columns, inverse, lanes, first, steps, x, y, taken, search);
        for (int64_t t = 0; t < steps; t++) {
            int64_t flat = t * lanes + first, count = size - flat < width ? size - flat : width;
            if (count == SIDE && side_stored && side_stored(x + t * SIDE, y + t * SIDE, i + flat, j + flat)) continue;
            step_stored(x + t * SIDE, y + t * SIDE, flat, count, i, j, outside);
        }
    }
}

#if AVX2
TARGET_AVX2 static void paths_avx2(
    const float *w, int64_t r, int64_t c, float inverse, int64_t l, void *scratch, int8_t *i, int8_t *j, Outside *outside) {
    paths_of(w, r, c, inverse, l, scratch, i, j, outside, viterbi_avx2, side_stored_avx2);
}
#else
#define paths_avx2 paths_base
#endif

static void paths_base(
    const float *w, int64_t r, int64_t c, float inverse, int64_t l, void *scratch, int8_t *i, int8_t *j, Outside *outside) {
    paths_of(w, r, c, inverse, l, scratch, i, j, outside, viterbi_base, NULL);
}

/* lattice.quantise_path of float32 weights to int8 planes. Pairs with a coordinate outside -128..127 become 0. Returns
 * their number, and lists the first `room` of them, in any order, with index and both coordinates. `scratch` holds 160
 * bytes for each step and for one more. */
EXPORT int64_t birkhoff_paths(
    const float *weight, int64_t rows, int64_t columns, float inverse, int64_t lanes, void *scratch, int8_t *i, int8_t *j,
    int64_t *index, int32_t *wide, int64_t room) {
    _Static_assert(PATH_SCRATCH == 160, "as lattice.py has it");
    Outside outside = {index, wide, room, 0};
    (use_avx2() ? paths_avx2 : paths_base)(weight, rows, columns, inverse, lanes, scratch, i, j, &outside);
    return outside.found;
}

/* Runs one step of the decoder for adjacent lanes. `three` becomes the new o. Returns whether a coordinate is outside
 * -128..127. */
INLINE int path_step_of(const uint8_t *symbols, int8_t *out, const uint8_t *one, const uint8_t *two, uint8_t *three, int64_t count) {
    uint8_t wide = 0;
    for (int64_t l = 0; l < count; l++) {
        uint8_t k = symbols[l] ^ 128;
        three[l] = (uint8_t)((k & 1) ^ two[l] ^ three[l]);
        out[l] = (int8_t)(uint8_t)(2 * k + one[l]);
        wide |= (uint8_t)(k ^ (uint8_t)(k << 1)); /* the top bit is set if 2 k and k differ in sign */
    }
    return wide >> 7;
}

TARGET_AVX2 static int path_step_avx2(const uint8_t *s, int8_t *out, const uint8_t *a, const uint8_t *b, uint8_t *c, int64_t n) {
    return path_step_of(s, out, a, b, c, n);
}

static int path_step_base(const uint8_t *s, int8_t *out, const uint8_t *a, const uint8_t *b, uint8_t *c, int64_t n) {
    return path_step_of(s, out, a, b, c, n);
}

/* trellis.numbers of a plane [rows, pairs] of symbols + 128, whose rows are `stride` apart, as int8. Returns how many
 * numbers do not fit, and lists the first `room` of them with flat index and value. `delays` holds 3 * lanes zeros. */
EXPORT int64_t birkhoff_path_numbers(
    const uint8_t *symbols, int64_t rows, int64_t pairs, int64_t stride, int64_t lanes, uint8_t *delays, int8_t *out,
    int64_t *index, int32_t *value, int64_t room) {
    int (*step)(const uint8_t *, int8_t *, const uint8_t *, const uint8_t *, uint8_t *, int64_t) =
        use_avx2() ? path_step_avx2 : path_step_base;
    uint8_t *one = delays, *two = delays + lanes, *three = delays + 2 * lanes;
    int64_t lane = 0, found = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < pairs;) {
            int64_t count = pairs - column < lanes - lane ? pairs - column : lanes - lane, flat = row * pairs + column;
            const uint8_t *from = symbols + row * stride + column;
            if (step(from, out + flat, one + lane, two + lane, three + lane, count))
                for (int64_t l = 0; l < count; l++) {
                    int32_t n = 2 * ((int32_t)from[l] - 128) + one[lane + l];
                    if (n >= -128 && n <= 127) continue;
                    if (found < room) index[found] = flat + l, value[found] = n;
                    found++;
                }
            column += count, lane += count;
            if (lane == lanes) {
                uint8_t *newest = three;
                three = two, two = one, one = newest, lane = 0;
            }
        }
    return found;
}

/* --- weights: lattice.LatticeTensor.decode for float32 -------------------------------------------------------- */

INLINE void positions_of(const int8_t *i, const int8_t *j, int64_t columns, float step, float *out) {
    for (int64_t left = 0; left < columns; left += 64) {
        int64_t width = columns - left < 64 ? columns - left : 64, half = (width + 1) / 2, pair = left / 2;
        if (width == 64) {
            for (int64_t k = 0; k < 32; k++)
                out[left + k] = ((float)i[pair + k] + (float)j[pair + k] * (1.0f / 256)) * step;
            for (int64_t k = 0; k < 32; k++) out[left + 32 + k] = (float)j[pair + k] * step;
        } else {
            for (int64_t k = 0; k < half; k++)
                out[left + k] = ((float)i[pair + k] + (float)j[pair + k] * (1.0f / 256)) * step;
            for (int64_t k = 0; k < width - half; k++) out[left + half + k] = (float)j[pair + k] * step;
        }
    }
}

TARGET_AVX2 static void positions_avx2(const int8_t *i, const int8_t *j, int64_t columns, float step, float *out) {
    positions_of(i, j, columns, step, out);
}

static void positions_base(const int8_t *i, const int8_t *j, int64_t columns, float step, float *out) {
    positions_of(i, j, columns, step, out);
}

/* Escapes are given by increasing flat pair index and both coordinates. */
EXPORT void birkhoff_positions(
    const int8_t *i, const int8_t *j, int64_t rows, int64_t columns, float step, int64_t escapes, const int64_t *index,
    const int32_t *escaped_i, const int32_t *escaped_j, float *out) {
    int64_t pairs = (columns + 1) / 2;
    void (*row_of)(const int8_t *, const int8_t *, int64_t, float, float *) = use_avx2() ? positions_avx2 : positions_base;
    for (int64_t row = 0; row < rows; row++) row_of(i + row * pairs, j + row * pairs, columns, step, out + row * columns);
    for (int64_t e = 0; e < escapes; e++) {
        float *line = out + index[e] / pairs * columns, a = (float)escaped_i[e], b = (float)escaped_j[e];
        Place at = place_of(index[e] % pairs, columns);
        line[at.x] = (a + b * (1.0f / 256)) * step;
        if (at.seconds > 0) line[at.y] = b * step;
    }
}

/* reference.decode: the same for step numbers, whose low byte is J + 128 and whose high byte is I + 128. */
INLINE void thetas_of(const uint16_t *theta, int64_t columns, float step, float *out) {
    for (int64_t left = 0; left < columns; left += 64) {
        int64_t width = columns - left < 64 ? columns - left : 64, half = (width + 1) / 2;
        float x[32], y[32];
        const uint16_t *from = theta + left / 2;
        for (int64_t k = 0; k < half; k++) {
            float i = (float)((int32_t)(from[k] >> 8) - 128), j = (float)((int32_t)(from[k] & 255) - 128);
            x[k] = (i + j * (1.0f / 256)) * step, y[k] = j * step;
        }
        memcpy(out + left, x, 4 * (size_t)half), memcpy(out + left + half, y, 4 * (size_t)(width - half));
    }
}

TARGET_AVX2 static void thetas_avx2(const uint16_t *theta, int64_t columns, float step, float *out) {
    thetas_of(theta, columns, step, out);
}

static void thetas_base(const uint16_t *theta, int64_t columns, float step, float *out) {
    thetas_of(theta, columns, step, out);
}

EXPORT void birkhoff_thetas(const uint16_t *theta, int64_t rows, int64_t columns, float step, float *out) {
    int64_t pairs = (columns + 1) / 2;
    void (*row_of)(const uint16_t *, int64_t, float, float *) = use_avx2() ? thetas_avx2 : thetas_base;
    for (int64_t row = 0; row < rows; row++) row_of(theta + row * pairs, columns, step, out + row * columns);
}

/* trajectory.theta_from_coordinates */
EXPORT void birkhoff_pack_thetas(const int8_t *restrict i, const int8_t *restrict j, int64_t size, uint16_t *restrict theta) {
    for (int64_t k = 0; k < size; k++) theta[k] = (uint16_t)(((uint8_t)i[k] << 8 | (uint8_t)j[k]) ^ 0x8080);
}

/* --- errors and ranges: metrics.py ------------------------------------------------------------------------------ */

/* Sums of float32 numbers are in double precision. Number k of a tensor goes into partial sum k mod PARTS, so the
 * result depends neither on the machine's vectors nor on how a tensor is divided. */
#define PARTS 16

typedef float Four __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));
typedef int32_t FourInts __attribute__((vector_size(16)));

INLINE Four four(const float *from) {
    Four x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE Four magnitude(Four x) { return (Four)((FourInts)x & (FourInts){INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}); }

INLINE Four greater(Four a, Four b) { /* b if one is NaN */
    FourInts mask = a > b;
    return (Four)(((FourInts)a & mask) | ((FourInts)b & ~mask));
}

INLINE Four lesser(Four a, Four b) {
    FourInts mask = a < b;
    return (Four)(((FourInts)a & mask) | ((FourInts)b & ~mask));
}

typedef struct {
    double error[PARTS], absolute[PARTS]; /* sums of (other - source)^2 and of |other - source| */
    float most[PARTS];                    /* the greatest |other - source| */
} Errors;

INLINE void error_of(const float *source, const float *other, int64_t k, int64_t part, Errors *sums) {
    float d = other[k] - source[k], size = __builtin_fabsf(d);
    sums->error[part] += (double)(d * d), sums->absolute[part] += (double)size;
    sums->most[part] = size > sums->most[part] ? size : sums->most[part];
}

/* metrics.compare. `first` is the position in the tensor of the first number. */
INLINE void errors_of(const float *source, const float *other, int64_t size, int64_t first, Errors *sums) {
    int64_t at = 0;
    for (; at < size && (first + at) % PARTS; at++) error_of(source, other, at, (first + at) % PARTS, sums);
    Doubles error[4], absolute[4];
    Four most[4];
    memcpy(error, sums->error, sizeof error), memcpy(absolute, sums->absolute, sizeof absolute);
    memcpy(most, sums->most, sizeof most);
    for (; at + PARTS <= size; at += PARTS)
        for (int v = 0; v < 4; v++) {
            Four d = four(other + at + 4 * v) - four(source + at + 4 * v), far = magnitude(d);
            error[v] += __builtin_convertvector(d * d, Doubles), absolute[v] += __builtin_convertvector(far, Doubles);
            most[v] = greater(far, most[v]);
        }
    memcpy(sums->error, error, sizeof error), memcpy(sums->absolute, absolute, sizeof absolute);
    memcpy(sums->most, most, sizeof most);
    for (; at < size; at++) error_of(source, other, at, (first + at) % PARTS, sums);
}

#if AVX2
TARGET_AVX2 static inline void add_wide(__m256d *low, __m256d *high, __m256 x) {
    *low = _mm256_add_pd(*low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    *high = _mm256_add_pd(*high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}

TARGET_AVX2 static void errors_avx2(const float *source, const float *other, int64_t size, int64_t first, Errors *sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    int64_t head = (PARTS - first % PARTS) % PARTS < size ? (PARTS - first % PARTS) % PARTS : size, at = head;
    errors_of(source, other, head, first, sums);
    __m256d error[4], absolute[4];
    __m256 most[2];
    for (int v = 0; v < 4; v++)
        error[v] = _mm256_loadu_pd(sums->error + 4 * v), absolute[v] = _mm256_loadu_pd(sums->absolute + 4 * v);
    for (int v = 0; v < 2; v++) most[v] = _mm256_loadu_ps(sums->most + 8 * v);
    for (; at + PARTS <= size; at += PARTS)
        for (int v = 0; v < 2; v++) {
            __m256 d = _mm256_sub_ps(_mm256_loadu_ps(other + at + 8 * v), _mm256_loadu_ps(source + at + 8 * v));
            __m256 far = _mm256_andnot_ps(sign, d);
            most[v] = _mm256_max_ps(far, most[v]); /* the second operand if one is NaN */
            add_wide(&error[2 * v], &error[2 * v + 1], _mm256_mul_ps(d, d));
            add_wide(&absolute[2 * v], &absolute[2 * v + 1], far);
        }
    for (int v = 0; v < 4; v++)
        _mm256_storeu_pd(sums->error + 4 * v, error[v]), _mm256_storeu_pd(sums->absolute + 4 * v, absolute[v]);
    for (int v = 0; v < 2; v++) _mm256_storeu_ps(sums->most + 8 * v, most[v]);
    errors_of(source + at, other + at, size - at, first + at, sums);
}
#else
#define errors_avx2 errors_base
#endif

static void errors_base(const float *source, const float *other, int64_t size, int64_t first, Errors *sums) {
    errors_of(source, other, size, first, sums);
}

EXPORT void birkhoff_compare(const float *source, const float *other, int64_t size, int64_t first, Errors *sums) {
    (use_avx2() ? errors_avx2 : errors_base)(source, other, size, first, sums);
}

typedef struct {
    double energy[PARTS];      /* sums of w^2 */
    float least[PARTS], most[PARTS];
    int32_t broken;            /* whether any is not a whole number below 2^31 */
} Range;

INLINE void range_of(float w, int64_t part, float limit, Range *range) {
    float size = __builtin_fabsf(w);
    range->energy[part] += size > limit ? 0.0 : (double)(w * w);
    range->least[part] = w < range->least[part] ? w : range->least[part];
    range->most[part] = w > range->most[part] ? w : range->most[part];
    if (!(size < 2147483648.0f) || (float)(int32_t)w != w) range->broken = 1;
}

/* survey.Surveying. The energy leaves out weights above `limit`. */
INLINE void ranges_of(const float *weight, int64_t size, int64_t first, float limit, Range *range) {
    int64_t at = 0;
    for (; at < size && (first + at) % PARTS; at++) range_of(weight[at], (first + at) % PARTS, limit, range);
    const Four most_counted = {limit, limit, limit, limit};
    Doubles energy[4];
    Four least[4], most[4];
    while (at + PARTS <= size) {
        int64_t end = at + 4096 < size ? at + 4096 : size;
        for (int64_t k = at; !range->broken && k < end; k++)
            if (!(__builtin_fabsf(weight[k]) < 2147483648.0f) || (float)(int32_t)weight[k] != weight[k]) range->broken = 1;
        memcpy(energy, range->energy, sizeof energy);
        memcpy(least, range->least, sizeof least), memcpy(most, range->most, sizeof most);
        for (; at + PARTS <= end; at += PARTS)
            for (int v = 0; v < 4; v++) {
                Four w = four(weight + at + 4 * v);
                FourInts far = magnitude(w) > most_counted;
                energy[v] += __builtin_convertvector((Four)((FourInts)(w * w) & ~far), Doubles);
                least[v] = lesser(w, least[v]), most[v] = greater(w, most[v]);
            }
        memcpy(range->energy, energy, sizeof energy);
        memcpy(range->least, least, sizeof least), memcpy(range->most, most, sizeof most);
    }
    for (; at < size; at++) range_of(weight[at], (first + at) % PARTS, limit, range);
}

#if AVX2
TARGET_AVX2 static void ranges_avx2(const float *weight, int64_t size, int64_t first, float limit, Range *range) {
    const __m256 sign = _mm256_set1_ps(-0.0f), counted = _mm256_set1_ps(limit);
    int64_t head = (PARTS - first % PARTS) % PARTS < size ? (PARTS - first % PARTS) % PARTS : size, at = head;
    ranges_of(weight, head, first, limit, range);
    while (!range->broken && at + PARTS <= size) { /* rarely more than one iteration */
        ranges_of(weight + at, PARTS, first + at, limit, range);
        at += PARTS;
    }
    __m256d energy[4];
    __m256 least[2], most[2];
    for (int v = 0; v < 4; v++) energy[v] = _mm256_loadu_pd(range->energy + 4 * v);
    for (int v = 0; v < 2; v++)
        least[v] = _mm256_loadu_ps(range->least + 8 * v), most[v] = _mm256_loadu_ps(range->most + 8 * v);
    for (; at + PARTS <= size; at += PARTS)
        for (int v = 0; v < 2; v++) {
            __m256 w = _mm256_loadu_ps(weight + at + 8 * v);
            __m256 far = _mm256_cmp_ps(_mm256_andnot_ps(sign, w), counted, _CMP_GT_OQ);
            add_wide(&energy[2 * v], &energy[2 * v + 1], _mm256_andnot_ps(far, _mm256_mul_ps(w, w)));
            least[v] = _mm256_min_ps(w, least[v]), most[v] = _mm256_max_ps(w, most[v]);
        }
    for (int v = 0; v < 4; v++) _mm256_storeu_pd(range->energy + 4 * v, energy[v]);
    for (int v = 0; v < 2; v++)
        _mm256_storeu_ps(range->least + 8 * v, least[v]), _mm256_storeu_ps(range->most + 8 * v, most[v]);
    ranges_of(weight + at, size - at, first + at, limit, range);
}
#else
#define ranges_avx2 ranges_base
#endif

static void ranges_base(const float *weight, int64_t size, int64_t first, float limit, Range *range) {
    ranges_of(weight, size, first, limit, range);
}

EXPORT void birkhoff_survey(const float *weight, int64_t size, int64_t first, float limit, Range *range) {
    (use_avx2() ? ranges_avx2 : ranges_base)(weight, size, first, limit, range);
}

/* rate._errors: birkhoff_compare of a matrix with its decoded coordinates. Escapes are given by increasing flat pair
 * index and both coordinates. */
#define TILE 1024 /* columns decoded at a time */

INLINE void coded_errors_of(
    const float *weight, int64_t rows, int64_t columns, const int8_t *i, const int8_t *j, float step, int64_t escapes,
    const int64_t *index, const int32_t *escaped_i, const int32_t *escaped_j, Errors *sums,
    void (*add)(const float *, const float *, int64_t, int64_t, Errors *)) {
    int64_t pairs = (columns + 1) / 2, next = 0;
    float tile[TILE];
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0; left < columns; left += TILE) {
            int64_t width = columns - left < TILE ? columns - left : TILE, start = row * pairs + left / 2;
            positions_of(i + start, j + start, width, step, tile);
            for (; next < escapes && index[next] < start + (width + 1) / 2; next++) {
                Place at = place_of(index[next] - row * pairs, columns);
                float a = (float)escaped_i[next], b = (float)escaped_j[next];
                tile[at.x - left] = (a + b * (1.0f / 256)) * step;
                if (at.seconds > 0) tile[at.y - left] = b * step;
            }
            add(weight + row * columns + left, tile, width, row * columns + left, sums);
        }
}

TARGET_AVX2 static void coded_errors_avx2(
    const float *w, int64_t r, int64_t c, const int8_t *i, const int8_t *j, float step, int64_t n, const int64_t *index,
    const int32_t *wide_i, const int32_t *wide_j, Errors *sums) {
    coded_errors_of(w, r, c, i, j, step, n, index, wide_i, wide_j, sums, errors_avx2);
}

static void coded_errors_base(
    const float *w, int64_t r, int64_t c, const int8_t *i, const int8_t *j, float step, int64_t n, const int64_t *index,
    const int32_t *wide_i, const int32_t *wide_j, Errors *sums) {
    coded_errors_of(w, r, c, i, j, step, n, index, wide_i, wide_j, sums, errors_base);
}

EXPORT void birkhoff_coded_errors(
    const float *weight, int64_t rows, int64_t columns, const int8_t *i, const int8_t *j, float step, int64_t escapes,
    const int64_t *index, const int32_t *escaped_i, const int32_t *escaped_j, Errors *sums) {
    (use_avx2() ? coded_errors_avx2 : coded_errors_base)(
        weight, rows, columns, i, j, step, escapes, index, escaped_i, escaped_j, sums);
}

typedef struct {
    Floats i, j;
} Nodes;

/* trajectory.nearest of adjacent pairs, up to WIDE of them. */
INLINE Nodes nearest(const float *x, const float *y, int64_t count, float inverse) {
    const Floats by = SPLAT_F(inverse), nth = SPLAT_F(1.0f / 256), one = SPLAT_F(1.0f);
    Floats v = loaded(y, count) * by, row = rounded(v);
    row = row + (Floats)((Ints)SPLAT_F(-1.0f) & (row > v)); /* the lower row */
    Floats below = v - row, t0 = loaded(x, count) * by - row * nth, t1 = t0 - nth;
    Floats i0 = rounded(t0), i1 = rounded(t1), e0 = t0 - i0, e1 = t1 - i1;
    Ints upper = (e1 * e1 + one) - (below + below) < e0 * e0;
    return (Nodes){chosen(upper, i1, i0), row + (Floats)((Ints)one & upper)};
}

/* trajectory.nearest, then trajectory.position: the weights that adjacent pairs decode to. */
INLINE void nearest_of(const float *x, const float *y, int64_t count, float inverse, float step, float *to_x, float *to_y) {
    const Floats size = SPLAT_F(step), nth = SPLAT_F(1.0f / 256);
    for (int64_t k = 0; k < count; k += WIDE) {
        Nodes node = nearest(x + k, y + k, count - k, inverse);
        Floats found_x = (node.i + node.j * nth) * size, found_y = node.j * size;
        size_t bytes = 4 * (size_t)(count - k < WIDE ? count - k : WIDE);
        memcpy(to_x + k, &found_x, bytes), memcpy(to_y + k, &found_y, bytes);
    }
}

INLINE void node_errors_of(
    const float *weight, int64_t rows, int64_t columns, float inverse, float step, Errors *sums,
    void (*add)(const float *, const float *, int64_t, int64_t, Errors *)) {
    float tile[TILE];
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0; left < columns; left += TILE) {
            const float *from = weight + row * columns + left;
            int64_t width = columns - left < TILE ? columns - left : TILE;
            for (int64_t at = 0; at < width; at += 64) {
                int64_t block = width - at < 64 ? width - at : 64, half = (block + 1) / 2;
                const float *second = from + at + half;
                float padded[32], decoded[32];
                if (block & 1) { /* the last pair has no second weight */
                    memcpy(padded, second, 4 * (size_t)(half - 1));
                    padded[half - 1] = 0.0f, second = padded;
                }
                nearest_of(from + at, second, half, inverse, step, tile + at, decoded);
                memcpy(tile + at + half, decoded, 4 * (size_t)(block - half));
            }
            add(from, tile, width, row * columns + left, sums);
        }
}

TARGET_AVX2 static void node_errors_avx2(const float *w, int64_t r, int64_t c, float inverse, float step, Errors *sums) {
    node_errors_of(w, r, c, inverse, step, sums, errors_avx2);
}

static void node_errors_base(const float *w, int64_t r, int64_t c, float inverse, float step, Errors *sums) {
    node_errors_of(w, r, c, inverse, step, sums, errors_base);
}

/* rate.error_of_nodes: birkhoff_compare of a matrix with its nearest nodes. No weight exceeds 2^22 steps. */
EXPORT void birkhoff_node_errors(
    const float *weight, int64_t rows, int64_t columns, float inverse, float step, Errors *sums) {
    (use_avx2() ? node_errors_avx2 : node_errors_base)(weight, rows, columns, inverse, step, sums);
}

INLINE void nodes_of(
    const float *weight, const float *less, int64_t rows, int64_t columns, float dead, float inverse, int8_t *i, int8_t *j,
    Outside *outside, int (*side_stored)(const float *, const float *, int8_t *, int8_t *)) {
    int64_t pairs = (columns + 1) / 2;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t left = 0; left < columns; left += 64) {
            const float *from = weight + row * columns + left, *held = less ? less + row * columns + left : NULL;
            int64_t width = columns - left < 64 ? columns - left : 64, half = (width + 1) / 2, flat = row * pairs + left / 2;
            float value[65], second[32], to_i[32 + WIDE], to_j[32 + WIDE];
            memcpy(value, from, 4 * (size_t)width);
            if (held) for (int64_t k = 0; k < width; k++) value[k] = value[k] - held[k];
            if (dead > 0)
                for (int64_t k = 0; k < width; k++) {
                    float near = value[k] > dead ? dead : value[k] < -dead ? -dead : value[k];
                    value[k] = value[k] - near;
                }
            value[width] = 0.0f; /* the last pair of an odd block has no second weight */
            memcpy(second, value + half, 4 * (size_t)half);
            for (int64_t k = 0; k < half; k += WIDE) {
                Nodes node = nearest(value + k, second + k, half - k, inverse);
                memcpy(to_i + k, &node.i, sizeof node.i), memcpy(to_j + k, &node.j, sizeof node.j);
            }
            for (int64_t k = 0; k < half; k += SIDE) {
                int64_t count = half - k < SIDE ? half - k : SIDE;
                if (count == SIDE && side_stored && side_stored(to_i + k, to_j + k, i + flat + k, j + flat + k)) continue;
                step_stored(to_i + k, to_j + k, flat + k, count, i, j, outside);
            }
        }
}

#if AVX2
TARGET_AVX2 static void nodes_avx2(
    const float *w, const float *less, int64_t r, int64_t c, float dead, float inverse, int8_t *i, int8_t *j, Outside *outside) {
    nodes_of(w, less, r, c, dead, inverse, i, j, outside, side_stored_avx2);
}
#else
#define nodes_avx2 nodes_base
#endif

static void nodes_base(
    const float *w, const float *less, int64_t r, int64_t c, float dead, float inverse, int8_t *i, int8_t *j, Outside *outside) {
    nodes_of(w, less, r, c, dead, inverse, i, j, outside, NULL);
}

/* lattice.quantise of float32 weights, less others where there are any, to int8 planes. No value exceeds 2^22 steps.
 * Pairs with a coordinate outside -128..127 become 0. Returns their number, and lists the first `room` of them by
 * increasing index, with both coordinates. */
EXPORT int64_t birkhoff_nodes(
    const float *weight, const float *less, int64_t rows, int64_t columns, float dead, float inverse, int8_t *i, int8_t *j,
    int64_t *index, int32_t *wide, int64_t room) {
    Outside outside = {index, wide, room, 0};
    (use_avx2() ? nodes_avx2 : nodes_base)(weight, less, rows, columns, dead, inverse, i, j, &outside);
    return outside.found;
}

/* lattice.of_coordinates: converts whole numbers to int8. Those outside -128..127 become 0. Returns how many there are,
 * and lists the indices of the first `room` of them. */
INLINE int64_t narrowed(const float *from, int64_t size, int8_t *out, int64_t *index, int64_t room) {
    int64_t outside = 0;
    for (int64_t start = 0; start < size; start += 4096) {
        int64_t end = size - start < 4096 ? size : start + 4096;
        int32_t wide = 0;
        for (int64_t at = start; at < end; at++) {
            int32_t n = (int32_t)from[at];
            int32_t inside = (n >= -128) & (n <= 127);
            wide |= !inside;
            out[at] = (int8_t)(n & -inside);
        }
        for (int64_t at = start; wide && at < end; at++)
            if (!(from[at] >= -128.0f && from[at] <= 127.0f)) {
                if (outside < room) index[outside] = at;
                outside++;
            }
    }
    return outside;
}

TARGET_AVX2 static int64_t narrowed_avx2(const float *from, int64_t size, int8_t *out, int64_t *index, int64_t room) {
    return narrowed(from, size, out, index, room);
}

static int64_t narrowed_base(const float *from, int64_t size, int8_t *out, int64_t *index, int64_t room) {
    return narrowed(from, size, out, index, room);
}

EXPORT int64_t birkhoff_narrow(const float *from, int64_t size, int8_t *out, int64_t *index, int64_t room) {
    return (use_avx2() ? narrowed_avx2 : narrowed_base)(from, size, out, index, room);
}

/* lattice.combine of planes of pairs: each coordinate is times * base + stride * own. A pair with a coordinate outside
 * -128..127 becomes 0. Returns how many such pairs there are, and lists the first `room` of them with index and both
 * coordinates, one after the other. Factors are small enough for sums in 16 bits. */
INLINE int64_t added(
    const int8_t *const base[2], const int8_t *const own[2], int64_t size, int32_t times, int32_t stride,
    int8_t *const out[2], int64_t *index, int32_t *wide, int64_t room) {
    const int16_t m = (int16_t)times, n = (int16_t)stride;
    int64_t outside = 0;
    for (int64_t start = 0; start < size; start += 1024) {
        int64_t count = size - start < 1024 ? size - start : 1024;
        const int8_t *restrict bi = base[0] + start, *restrict bj = base[1] + start;
        const int8_t *restrict oi = own[0] + start, *restrict oj = own[1] + start;
        int8_t *restrict to_i = out[0] + start, *restrict to_j = out[1] + start;
        int16_t far = 0;
        for (int64_t at = 0; at < count; at++) {
            int16_t i = (int16_t)(m * bi[at] + n * oi[at]), j = (int16_t)(m * bj[at] + n * oj[at]);
            /* 0 if both fit a byte: the difference between n and its low byte as a signed number */
            int16_t left = (int16_t)((i - (int8_t)i) | (j - (int8_t)j));
            int16_t keep = left ? 0 : -1;
            far |= left;
            to_i[at] = (int8_t)(i & keep), to_j[at] = (int8_t)(j & keep);
        }
        for (int64_t at = 0; far && at < count; at++) {
            int32_t i = m * bi[at] + n * oi[at], j = m * bj[at] + n * oj[at];
            if (i < -128 || i > 127 || j < -128 || j > 127) {
                if (outside < room) index[outside] = start + at, wide[2 * outside] = i, wide[2 * outside + 1] = j;
                outside++;
            }
        }
    }
    return outside;
}

TARGET_AVX2 static int64_t added_avx2(
    const int8_t *const base[2], const int8_t *const own[2], int64_t size, int32_t times, int32_t stride,
    int8_t *const out[2], int64_t *index, int32_t *wide, int64_t room) {
    return added(base, own, size, times, stride, out, index, wide, room);
}

static int64_t added_base(
    const int8_t *const base[2], const int8_t *const own[2], int64_t size, int32_t times, int32_t stride,
    int8_t *const out[2], int64_t *index, int32_t *wide, int64_t room) {
    return added(base, own, size, times, stride, out, index, wide, room);
}

EXPORT int64_t birkhoff_add(
    const int8_t *base_i, const int8_t *base_j, const int8_t *own_i, const int8_t *own_j, int64_t size, int32_t times,
    int32_t stride, int8_t *i, int8_t *j, int64_t *index, int32_t *wide, int64_t room) {
    const int8_t *const base[2] = {base_i, base_j}, *const own[2] = {own_i, own_j};
    int8_t *const out[2] = {i, j};
    return (use_avx2() ? added_avx2 : added_base)(base, own, size, times, stride, out, index, wide, room);
}

/* --- batches: the host's part of packing on a GPU ------------------------------------------------------------ */

/* contexts.groupings: of planes of `shapes` [count][2] by `rules` [count][2]; changes `levels` in place and writes
 * `entries` in the same layout, `tables` [count][64 * 64 + 64], `sizes` [count][64] and `groups` [count]. The rows of
 * planes that are `even` [count] have neither levels nor entries. */
EXPORT void birkhoff_groupings(
    int64_t count, const int64_t *shapes, const int64_t *rules, const uint8_t *even, uint8_t *levels, int64_t *entries,
    int64_t *tables, int64_t *sizes, int64_t *groups) {
    for (int64_t plane = 0; plane < count; plane++) {
        int64_t columns = shapes[2 * plane + 1], rows = even[plane] ? 0 : shapes[2 * plane];
        uint8_t *part = levels;
        for (int half = 0; half < 2; half++) {
            int64_t size = half ? columns : rows;
            uint8_t smallest = 255;
            for (int64_t at = 0; at < size; at++) smallest = part[at] < smallest ? part[at] : smallest;
            for (int64_t at = 0; at < size; at++) {
                uint8_t level = (uint8_t)(part[at] - smallest);
                part[at] = level < 63 ? level : 63;
            }
            part += size;
        }
        int64_t *base = tables + plane * (64 * 64 + 64);
        groups[plane] = birkhoff_addresses(
            even[plane] ? NULL : levels, shapes[2 * plane], levels + rows, columns, rules[2 * plane],
            (int32_t)rules[2 * plane + 1], entries, entries + rows, base, base + 64 * 64, sizes + 64 * plane);
        levels += rows + columns, entries += rows + columns;
    }
}

/* rest.heads: writes the bytes that precede the blocks of streams by tables, one after the other. `words` has the
 * numbers of words of all blocks. Returns the number of bytes. */
EXPORT int64_t birkhoff_stream_heads(
    int64_t streams, const int64_t *lanes_log2, const uint8_t *data, const int64_t *length, const int64_t *blocks,
    const int64_t *words, uint8_t *out) {
    const uint8_t *begin = out;
    for (int64_t s = 0; s < streams; s++) {
        *out++ = 2, *out++ = (uint8_t)lanes_log2[s];
        memcpy(out, data + 2048 * s, (size_t)length[s]), out += length[s];
        for (int64_t block = 0; block < blocks[s]; block++, words++) {
            uint32_t count = (uint32_t)*words;
            if (block < blocks[s] - 1) memcpy(out, &count, 4), out += 4;
        }
    }
    return out - begin;
}

/* plan.scales._sample: reads `blocks` blocks of `block` bytes each, spread evenly over `count` elements of `size` bytes
 * from `offset` of a file on, one after the other into `out`. `block` is a multiple of `size`. Returns the number of
 * bytes that the file had, or -1 with errno. */
EXPORT int64_t birkhoff_sample(
    int32_t file, int64_t offset, int64_t count, int64_t size, int64_t blocks, int64_t block, uint8_t *out) {
    int64_t found = 0;
    for (int64_t n = 0; n < blocks; n++) {
        int64_t at = offset + (count - block / size) * n / (blocks - 1) * size, left = block;
        while (left) {
            ssize_t got = pread(file, out + found, (size_t)left, (off_t)at);
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return -1;
            if (!got) break;
            found += got, at += got, left -= got;
        }
    }
    return found;
}

INLINE int32_t word_of(const uint8_t *planes, int64_t size, int64_t at) {
    return (int32_t)(planes[at] | (uint32_t)planes[size + at] << 8 | (uint32_t)planes[2 * size + at] << 16 |
                     (uint32_t)planes[3 * size + at] << 24);
}

/* rest.unpack_escapes_all: `planes` has 4 byte planes of int32 for each tensor: `counts` gaps, then I, then J. Writes
 * the pair index, I and J of all escapes. Returns the number of the first tensor whose escapes do not increase, lie
 * outside its `pairs` or need none, as coordinates reach `reaches` times -128..127; else the number of tensors. */
EXPORT int64_t birkhoff_unpack_escapes(
    int64_t tensors, const uint8_t *planes, const int64_t *counts, const int64_t *pairs, const int64_t *reaches,
    int64_t *pair, int32_t *i, int32_t *j) {
    for (int64_t t = 0; t < tensors; t++) {
        int64_t count = counts[t], size = 3 * count, at = 0, low = -128 * reaches[t], high = 128 * reaches[t];
        for (int64_t e = 0; e < count; e++) {
            int64_t gap = word_of(planes, size, e), a = word_of(planes, size, count + e);
            int64_t b = word_of(planes, size, 2 * count + e);
            at += gap;
            if (gap < (e ? 1 : 0) || at >= pairs[t] || (a >= low && a < high && b >= low && b < high)) return t;
            pair[e] = at, i[e] = (int32_t)a, j[e] = (int32_t)b;
        }
        planes += 4 * size, pair += count, i += count, j += count;
    }
    return tensors;
}

/* lattice.escaped_weights_all: of the escapes up to ends[t] of each tensor, whose pairs increase, writes the flat index
 * row * K + column, increasing, and the value of each weight. There are up to 2 for each escape; writes to `counts` how
 * many there are up to the end of each tensor. */
EXPORT void birkhoff_escaped_weights(
    int64_t tensors, const int64_t *ends, const int64_t *columns_of, const float *step_of, const int64_t *pair,
    const int32_t *i, const int32_t *j, int64_t *index, float *value, int64_t *counts) {
    int64_t found = 0, e = 0;
    for (int64_t t = 0; t < tensors; t++) {
        int64_t columns = columns_of[t], pairs = (columns + 1) / 2;
        float step = step_of[t];
        for (int64_t end; e < ends[t]; e = end) {
            int64_t row = pair[e] / pairs, block = pair[e] % pairs / 32, limit = row * pairs + 32 * (block + 1);
            if (limit > (row + 1) * pairs) limit = (row + 1) * pairs;
            for (end = e; end < ends[t] && pair[end] < limit; end++) { /* a block's first weights precede its second */
                index[found] = row * columns + place_of(pair[end] - row * pairs, columns).x;
                value[found++] = ((float)i[end] + (float)j[end] * (1.0f / 256)) * step;
            }
            for (int64_t k = e; k < end; k++) {
                Place at = place_of(pair[k] - row * pairs, columns);
                if (at.seconds > 0) index[found] = row * columns + at.y, value[found++] = (float)j[k] * step;
            }
        }
        counts[t] = found;
    }
}

#define DIGIT 11

/* Sorts numbers below 2^(11 * passes), each with a value, by a stable pass for every digit. Returns where they are. */
static int sort_by_digits(int64_t count, int64_t *number[2], int64_t *value[2], int passes) {
    int from = 0;
    for (int pass = 0; pass < passes; pass++, from ^= 1) {
        int64_t place[1 << DIGIT] = {0}, sum = 0;
        for (int64_t n = 0; n < count; n++) place[number[from][n] >> (DIGIT * pass) & ((1 << DIGIT) - 1)]++;
        for (int64_t d = 0; d < 1 << DIGIT; d++) {
            int64_t here = place[d];
            place[d] = sum, sum += here;
        }
        for (int64_t n = 0; n < count; n++) {
            int64_t at = place[number[from][n] >> (DIGIT * pass) & ((1 << DIGIT) - 1)]++;
            number[from ^ 1][at] = number[from][n], value[from ^ 1][at] = value[from][n];
        }
    }
    return from;
}

/* entropy.op._merge: merges escapes that are stored with pairs that have a coordinate outside int8. The planes of tensor
 * t are at begins[t] to begins[t + 1] among those of all tensors, and a pair's place is that of its I. `told` are the
 * increasing places of stored escapes. `key` and `value` [2, count] list the coordinates outside in their first
 * row, in any order; the second row is scratch. A key is 2 * place, plus 1 for J; its value is I and J of the pair, of
 * which only the coordinate outside is sure if both are. Writes the pair's number in its tensor and the coordinates, for
 * which there is room for all, and in `ends` how many there are up to the end of each tensor. Returns their number. */
EXPORT int64_t birkhoff_merge_escapes(
    int64_t tensors, const int64_t *begins, int64_t tolds, const int64_t *told, const int32_t *told_i,
    const int32_t *told_j, int64_t count, int64_t *key, int64_t *value, int64_t *pair, int32_t *i, int32_t *j,
    int64_t *ends) {
    int64_t *keys[2] = {key, key + count}, *values[2] = {value, value + count};
    int passes = 0;
    for (int64_t most = 2 * begins[tensors]; most; most >>= DIGIT) passes++;
    int sorted = sort_by_digits(count, keys, values, passes);
    const int64_t *place = keys[sorted], *both = values[sorted];
    int64_t a = 0, b = 0, found = 0;
    for (int64_t t = 0; t < tensors; t++) {
        int64_t end = begins[t + 1];
        for (;; found++) {
            int64_t mine = a < tolds ? told[a] : INT64_MAX, other = b < count ? place[b] >> 1 : INT64_MAX;
            if (mine >= end && other >= end) break;
            if (mine <= other) {
                pair[found] = mine - begins[t], i[found] = told_i[a], j[found] = told_j[a], a++;
                while (b < count && place[b] >> 1 == mine) b++;
            } else {
                int64_t last = b + 1 < count && place[b + 1] >> 1 == other ? b + 1 : b;
                pair[found] = other - begins[t], i[found] = (int32_t)both[b], j[found] = (int32_t)(both[last] >> 32);
                b = last + 1;
            }
        }
        ends[t] = found;
    }
    return found;
}
