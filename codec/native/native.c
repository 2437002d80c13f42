/* The codec's inner loops in C: histograms, code tables, rANS, grouping, paths of the trellis.
 *
 * Each function gives the very bytes of its reference in Python, which is named above it and says what is computed and
 * why; here is only how it is computed fast. Floating point is rounded operation by operation (-ffp-contract=off).
 * Nothing is allocated, no input is trusted: what a reader passes on is bounded by the sizes beside it.
 *
 * Loops that vectors help are written once as inline functions and compiled twice, for the machine's base instructions
 * and for AVX2 where there is one; AVX2's gathers decode rANS in a function of their own.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

static int vectors = -1; /* -1: whatever the machine has; 0: base instructions only, for tests */

static int use_avx2(void) { return AVX2 && vectors != 0 && has_avx2(); }

/* Raised with every change of a function's meaning; library.py compares it. */
EXPORT int32_t birkhoff_native_version(void) { return 7; }

/* Use AVX2 or not from now on (1, 0); returns whether it is in use. */
EXPORT int32_t birkhoff_native_vectors(int32_t wanted) {
    vectors = wanted ? -1 : 0;
    return use_avx2();
}

/* --- histograms: numpy.bincount(data, minlength=256) ---------------------------------------------------------- */

EXPORT void birkhoff_histogram(const uint8_t *data, int64_t size, int64_t *counts) {
    memset(counts, 0, 256 * sizeof *counts);
    while (size > 0) {
        /* Four tables: neighbours that are equal would wait for each other's sum. */
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

static uint32_t cost_of[SLOTS + 1]; /* bits of a symbol of that frequency, 16 of them fractions */

__attribute__((constructor)) static void fill_costs(void) {
    for (uint32_t f = SLOTS; f; f--) cost_of[f] = ((uint32_t)BITS << 16) - log2_fixed(f);
}

/* tables.frequencies_of: 0, or -1 where the fields make no table */
static int frequencies_of(const int32_t *field, int symbols, int fine, uint16_t *frequency) {
    int64_t weight[256], total = 0, sum = 0;
    int used = 0, largest = 0;
    for (int s = 0; s < symbols; s++) {
        int32_t q = field[s] - 1;
        weight[s] = q < 0 ? 0 : (int64_t)((1 << fine) + (q & ((1 << fine) - 1))) << (q >> fine);
        total += weight[s], used += q >= 0;
    }
    if (used < 2) return -1;
    int64_t found[256];
    for (int s = 0; s < symbols; s++) {
        found[s] = weight[s] * SLOTS / total;
        if (weight[s] && !found[s]) found[s] = 1;
        sum += found[s];
        if (found[s] > found[largest]) largest = s;
    }
    found[largest] += SLOTS - sum;
    if (found[largest] < 1) return -1;
    for (int s = 0; s < symbols; s++) frequency[s] = (uint16_t)found[s];
    return 0;
}

static int32_t field_of(int64_t count, int fine) { /* tables.fields_of */
    if (!count) return 0;
    int octave = 63 - __builtin_clzll((uint64_t)count);
    int64_t mantissa = octave > fine ? (count + ((int64_t)1 << (octave - fine - 1))) >> (octave - fine)
                                     : count << (fine - octave);
    return (int32_t)(((int64_t)(octave - 1) * (1 << fine)) + mantissa) + 1;
}

/* tables.fit: bytes of the table (written to `out`, 2048 bytes), frequencies [256], and the cost in 2^-16 bits, table
 * included; 0 where fewer than two symbols occur. */
EXPORT int32_t birkhoff_table_fit(const int64_t *counts, uint8_t *out, uint16_t *frequency, int64_t *cost) {
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
        for (int rice = 0; rice <= MOST_RICE; rice++) {
            int64_t bits = 0;
            int32_t last = 0;
            for (int s = 0; s < symbols; s++) {
                int32_t delta = field[s] - last, z = delta >= 0 ? 2 * delta : -2 * delta - 1;
                bits += (z >> rice) + 1 + rice, last = field[s];
            }
            if (data + (bits << 16) < best) best = data + (bits << 16), best_fine = fine, best_rice = rice;
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

/* tables.parse: bytes of the table, or -1 where it is none; `frequency` is [256]. */
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

/* rans.encode_blocks: bytes written, at most (8 + 4 * lanes) * blocks + 2 * size; `scratch` holds BLOCK uint16. */
EXPORT int64_t birkhoff_rans_encode(
    const uint8_t *symbols, int64_t size, int32_t lanes, const uint16_t *frequency, uint16_t *scratch, uint8_t *out) {
    /* floor(x / F) = x * inverse >> 44 for all x below F * 2^20, and the product stays below 2^64. */
    struct {
        uint64_t inverse;
        uint32_t limit;
        uint16_t rest, start;
    } of[256];
    uint32_t total = 0;
    for (int s = 0; s < 256; s++) {
        uint32_t f = frequency[s];
        of[s].inverse = f ? ((uint64_t)1 << 44) / f + 1 : 0;
        of[s].limit = f << 20, of[s].rest = (uint16_t)(SLOTS - f), of[s].start = (uint16_t)total;
        total += f;
    }
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
    uint8_t *directory = out, *to = out + 4 * (blocks - 1);
    for (int64_t block = 0; block < blocks; block++) {
        const uint8_t *from = symbols + block * BLOCK;
        int32_t count = (int32_t)(size - block * BLOCK < BLOCK ? size - block * BLOCK : BLOCK);
        uint32_t state[MOST_LANES];
        uint16_t *word = scratch + BLOCK;
        for (int lane = 0; lane < lanes; lane++) state[lane] = LEAST_STATE;
        for (int32_t at = count - 1; at >= 0; at--) {
            uint32_t symbol = from[at], *x = &state[at & (lanes - 1)], value = *x;
            uint32_t emit = value >= of[symbol].limit;
            word[-1] = (uint16_t)value; /* kept only if counted */
            word -= emit;
            value = emit ? value >> 16 : value;
            *x = value + (uint32_t)(value * of[symbol].inverse >> 44) * of[symbol].rest + of[symbol].start;
        }
        uint32_t words = (uint32_t)(scratch + BLOCK - word);
        if (block < blocks - 1) memcpy(directory + 4 * block, &words, 4);
        memcpy(to, state, 4 * (size_t)lanes), to += 4 * lanes;
        memcpy(to, word, 2 * (size_t)words), to += 2 * words;
    }
    return to - out;
}

typedef struct {
    const uint8_t *word, *end; /* pairs of bytes still to be read */
    int32_t at;                /* symbols decoded */
} Cursor;

INLINE int decode_scalar(
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
/* For each mask of lanes that read a word: which word each of the eight takes. */
static uint8_t order_of_words[256 * 8];

__attribute__((constructor)) static void fill_order(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int lane = 0, next = 0; lane < 8; lane++)
            order_of_words[8 * mask + lane] = (uint8_t)(mask >> lane & 1 ? next++ : 0);
}

#define STEP(x, symbol)                                                                                                \
    do {                                                                                                               \
        __m256i entry = _mm256_i32gather_epi32((const int *)table, _mm256_and_si256(x, slots), 4);                     \
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

/* rans.decode_blocks: 0, or -1 where the bytes are no such code; `data` is all behind the table. */
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
        int wrong;
        if (lanes == 4)
            wrong = decode_scalar(&cursor, state, table, count, 4, out);
        else
            wrong = decode_scalar(&cursor, state, table, count, lanes, out);
        if (wrong || cursor.word != cursor.end) return -1;
        for (int lane = 0; lane < lanes; lane++)
            if (state[lane] != LEAST_STATE) return -1;
        from = cursor.end, out += count;
    }
    return from == all ? 0 : -1;
}

/* rest.plan: what a decoder of many blocks at once is told of streams [count] of whole form (kind first), each of
 * `size` > 0 symbols: their frequencies [count][256], zeros for raw ones, and a row of seven for each block: place of
 * its states (of its bytes, if raw), words (bytes), place of its symbols, symbols, stream, lanes (0: raw), 0. Places
 * count from `source` and `target` of the stream. Returns the number of rows, or -1 - s of the first damaged stream. */
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

/* --- groups: entropy/groups.py ---------------------------------------------------------------------------------- */

/* Row r of a plane [R, C] lies in the groups at base[row_level[r]][b] + row_rank[r] * width[b] for each column level b;
 * `order` [C] are the columns by level. `scratch` holds C bytes. `into`: plane to groups, else groups to plane. */
EXPORT void birkhoff_regroup(
    uint8_t *plane, int64_t rows, int64_t columns, uint8_t *groups, int32_t levels, const int64_t *base,
    const int64_t *width, const int64_t *row_level, const int64_t *row_rank, const int64_t *order, uint8_t *scratch,
    int32_t into) {
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *line = plane + row * columns, *sorted = scratch;
        const int64_t *start = base + row_level[row] * levels;
        if (into)
            for (int64_t column = 0; column < columns; column++) sorted[column] = line[order[column]];
        for (int32_t level = 0; level < levels; level++) {
            uint8_t *place = groups + start[level] + row_rank[row] * width[level];
            if (into)
                memcpy(place, sorted, (size_t)width[level]);
            else
                memcpy(sorted, place, (size_t)width[level]);
            sorted += width[level];
        }
        if (!into)
            for (int64_t column = 0; column < columns; column++) line[order[column]] = scratch[column];
    }
}

/* contexts.addresses: numbers of the groups' symbols, as sums of what is looked up by row and by column. An entry of
 * `of_row` [rows] and `of_column` [columns] is 64 times a rank, and a level; `base` is [64][64], `width` [64], `sizes`
 * [64], of the groups. Returns their number. Without `of_row` and `of_column` the rest alone is made. */
EXPORT int32_t birkhoff_addresses(
    const uint8_t *row_level, int64_t rows, const uint8_t *column_level, int64_t columns, int64_t least, int32_t most,
    int64_t *of_row, int64_t *of_column, int64_t *base, int64_t *width, int64_t *sizes) {
    int64_t height[64] = {0}, sums[127] = {0}, left = rows * columns, start = 0;
    int32_t group_of[127], group = 0, greatest = 0;
    memset(width, 0, 64 * sizeof *width), memset(base, 0, 64 * 64 * sizeof *base), memset(sizes, 0, 64 * sizeof *sizes);
    if (of_row) {
        for (int64_t row = 0; row < rows; row++)
            of_row[row] = height[row_level[row] & 63]++ << 6 | (row_level[row] & 63);
        for (int64_t column = 0; column < columns; column++)
            of_column[column] = width[column_level[column] & 63]++ << 6 | (column_level[column] & 63);
    } else {
        for (int64_t row = 0; row < rows; row++) height[row_level[row] & 63]++;
        for (int64_t column = 0; column < columns; column++) width[column_level[column] & 63]++;
    }
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

/* contexts.mean_squares: exact sums of (symbol - 128)^2 of a plane's rows and columns */
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

INLINE Floats rounded(Floats x) { /* to nearest, ties to even; |x| < 2^22 */
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

/* The best paths of up to WIDE lanes from `first`; `taken` holds WIDE int32 for each step. */
INLINE void viterbi_of(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    int64_t steps = (size + lanes - 1) / lanes, width = lanes - first < WIDE ? lanes - first : WIDE;
    const Floats far = SPLAT_F(1e9f), quarter = SPLAT_F(0.25f);
    Floats m[8] = {SPLAT_F(0.0f), far, far, far, far, far, far, far};
    for (int64_t t = 0; t < steps; t++) {
        int64_t left = size - t * lanes - first; /* a lane that is over sees a zero */
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

TARGET_AVX2 static void viterbi_avx2(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    viterbi_of(u, size, lanes, first, taken);
}

static void viterbi_base(float *u, int64_t size, int64_t lanes, int64_t first, int32_t *taken) {
    viterbi_of(u, size, lanes, first, taken);
}

/* trellis.search_: in place; `scratch` holds 8 int32 for each step. */
EXPORT void birkhoff_viterbi(float *u, int64_t size, int64_t lanes, int32_t *scratch) {
    void (*search)(float *, int64_t, int64_t, int64_t, int32_t *) = use_avx2() ? viterbi_avx2 : viterbi_base;
    for (int64_t first = 0; first < lanes; first += WIDE) search(u, size, lanes, first, scratch);
}

/* One step of the automaton for lanes side by side; whether a coordinate left -128..127. `delay` becomes the new o. */
INLINE int path_step_of(const uint8_t *symbols, int8_t *out, const uint8_t *one, const uint8_t *two, uint8_t *three, int64_t count) {
    uint8_t wide = 0;
    for (int64_t l = 0; l < count; l++) {
        uint8_t k = symbols[l] ^ 128;
        three[l] = (uint8_t)((k & 1) ^ two[l] ^ three[l]);
        out[l] = (int8_t)(uint8_t)(2 * k + one[l]);
        wide |= (uint8_t)(k ^ (uint8_t)(k << 1)); /* the top bit: whether 2 k has another sign than k */
    }
    return wide >> 7;
}

TARGET_AVX2 static int path_step_avx2(const uint8_t *s, int8_t *out, const uint8_t *a, const uint8_t *b, uint8_t *c, int64_t n) {
    return path_step_of(s, out, a, b, c, n);
}

static int path_step_base(const uint8_t *s, int8_t *out, const uint8_t *a, const uint8_t *b, uint8_t *c, int64_t n) {
    return path_step_of(s, out, a, b, c, n);
}

/* trellis.numbers of a plane [rows, pairs] of symbols + 128, whose rows lie `stride` apart, as int8; those that are
 * none: their number, the first `room` of them with flat index and value. `delays` holds 3 * lanes zeros. */
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

EXPORT void birkhoff_positions(const int8_t *i, const int8_t *j, int64_t rows, int64_t columns, float step, float *out) {
    int64_t pairs = (columns + 1) / 2;
    void (*row_of)(const int8_t *, const int8_t *, int64_t, float, float *) = use_avx2() ? positions_avx2 : positions_base;
    for (int64_t row = 0; row < rows; row++) row_of(i + row * pairs, j + row * pairs, columns, step, out + row * columns);
}

/* lattice.of_coordinates: whole numbers as int8; how many lie outside -128..127, which become 0, the first `room` of
 * them with their indices. */
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

/* pairs.split of float32 weights, times `factor`; returns the greatest |value|. */
INLINE float split_of(const float *weight, int64_t rows, int64_t columns, float factor, float *first, float *second) {
    int64_t pairs = (columns + 1) / 2;
    float most[32] = {0};
    for (int64_t row = 0; row < rows; row++, weight += columns, first += pairs, second += pairs) {
        int64_t left = 0;
        for (; left + 64 <= columns; left += 64)
            for (int64_t k = 0; k < 32; k++) {
                float x = weight[left + k] * factor, y = weight[left + 32 + k] * factor;
                float a = __builtin_fabsf(x), b = __builtin_fabsf(y), both = a > b ? a : b;
                most[k] = both > most[k] ? both : most[k];
                first[left / 2 + k] = x, second[left / 2 + k] = y;
            }
        int64_t width = columns - left, half = (width + 1) / 2;
        for (int64_t k = 0; k < half; k++) {
            float x = weight[left + k] * factor, y = k + half < width ? weight[left + half + k] * factor : 0.0f;
            float a = __builtin_fabsf(x), b = __builtin_fabsf(y), both = a > b ? a : b;
            most[k] = both > most[k] ? both : most[k];
            first[left / 2 + k] = x, second[left / 2 + k] = y;
        }
    }
    float greatest = 0;
    for (int k = 0; k < 32; k++) greatest = most[k] > greatest ? most[k] : greatest;
    return greatest;
}

TARGET_AVX2 static float split_avx2(const float *w, int64_t r, int64_t c, float factor, float *first, float *second) {
    return split_of(w, r, c, factor, first, second);
}

static float split_base(const float *w, int64_t r, int64_t c, float factor, float *first, float *second) {
    return split_of(w, r, c, factor, first, second);
}

EXPORT float birkhoff_split(
    const float *weight, int64_t rows, int64_t columns, float factor, float *first, float *second) {
    return (use_avx2() ? split_avx2 : split_base)(weight, rows, columns, factor, first, second);
}

/* lattice.combine of planes of pairs: each coordinate is times * base + stride * own. A pair with one outside -128..127
 * becomes 0, and its index and its two coordinates (one after the other) are noted. Returns how many there are; past
 * `room` none is noted. Factors are small enough for 16 bits. */
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
            /* 0 if both fit a byte: what is left of n when its byte, sign and all, is taken away */
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

/* --- batches: what a GPU's packing asks of the host ---------------------------------------------------------- */

/* contexts.groupings: `levels` in place, `entries` laid out as they are, `tables` [count][64 * 64 + 64], `sizes`
 * [count][64], `groups` [count]. */
EXPORT void birkhoff_groupings(
    int64_t count, const int64_t *shapes, int64_t least, int32_t most, uint8_t *levels, int64_t *entries,
    int64_t *tables, int64_t *sizes, int64_t *groups) {
    for (int64_t plane = 0; plane < count; plane++) {
        int64_t rows = shapes[2 * plane], columns = shapes[2 * plane + 1];
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
            levels, rows, levels + rows, columns, least, most, entries, entries + rows, base, base + 64 * 64,
            sizes + 64 * plane);
        levels += rows + columns, entries += rows + columns;
    }
}

/* tables.fit_all: tables.fit of counts [streams][256] into `data` [streams][2048], `length` (0: no table), `frequency`
 * [streams][256] and `cost`. */
EXPORT void birkhoff_table_fits(
    int64_t streams, const int64_t *counts, uint8_t *data, int64_t *length, uint16_t *frequency, int64_t *cost) {
    for (int64_t s = 0; s < streams; s++) {
        cost[s] = 0;
        length[s] = birkhoff_table_fit(counts + 256 * s, data + 2048 * s, frequency + 256 * s, cost + s);
    }
}

/* rest.heads: what stands before the blocks of streams by a table, one after the other. `words` has the words of all
 * blocks. Returns the bytes. */
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
