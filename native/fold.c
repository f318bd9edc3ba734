/* The fold on the CPU: one call reads a tile of every checkpoint, averages it and writes it.

   Python decides everything: which checkpoint is folded into which average with which weight, where
   each tensor lies, where each average goes. It calls `fold` once a tile; the interpreter lock is
   released meanwhile. Here are, in this order: numbers (widening, folding, rounding, measuring),
   files, tensors in pieces, the screening of values for monitors, blocks, and the functions of the
   module.

   Contraction must be off (-ffp-contract=off): a multiply-add is fused where `fma` is written and
   nowhere else, so that every machine, vector width and compiler gives the same bits. */

#ifndef _GNU_SOURCE /* some versions of Python define it too */
#define _GNU_SOURCE 1
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <sys/uio.h>
#endif

#if FLT_EVAL_METHOD != 0 || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "this machine would give other bits: ckpt-ema folds with torch there"
#endif

#define INLINE static inline __attribute__((always_inline))

enum { STRIP = 256 };   /* elements folded at a time; memory is padded to whole strips */
enum { GROUP = 8 };     /* checkpoints whose blocks are in memory together */
enum { AXES = 64 };     /* the most that a tensor may have */
enum { HEAD = 4096 };   /* elements of a large tensor that are screened */
enum { MOST_READ = 4 }; /* elements that a read may fetch for each one wanted */

enum dtype { BF16, F16, F32, F64, DTYPES };
static const int64_t WIDTH[DTYPES] = {2, 2, 4, 8}; /* bytes of an element */

/* Numbers: each function takes STRIP elements. */

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* A half is a float with fewer bits: shifted into place, its exponent is 112 too small, which a
   multiplication mends exactly, for subnormal numbers too. */
INLINE float float_of_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000; /* infinity or NaN */
    uint32_t bits = (half & 0x7c00) == 0x7c00 ? special : finite;
    return float_of(bits | (uint32_t)(half & 0x8000) << 16);
}

/* To nearest, ties to even. A subnormal half is rounded by adding a number whose last bit is worth
   as much as that half's. NaN stays NaN. */
INLINE uint16_t half_of_float(float value) {
    uint32_t bits = bits_of(value), sign = bits & 0x80000000, magnitude = bits ^ sign;
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    uint32_t odd = magnitude >> 13 & 1;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + odd) >> 13;
    uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    uint32_t half = magnitude >= 0x47800000 ? special : finite;
    return (uint16_t)(half | sign >> 16);
}

INLINE double element(const void *raw, int i, enum dtype dtype) {
    switch (dtype) {
    case BF16: return float_of((uint32_t)((const uint16_t *)raw)[i] << 16);
    case F16: return float_of_half(((const uint16_t *)raw)[i]);
    case F32: return ((const float *)raw)[i];
    default: return ((const double *)raw)[i];
    }
}

/* Each dtype and each kind of use gets a loop of its own: with `dtype` constant, no switch is left
   in it. */
INLINE void widen_as(double *restrict wide, const void *restrict raw, enum dtype dtype) {
    for (int i = 0; i < STRIP; i++) wide[i] = element(raw, i, dtype);
}

INLINE void widen(double *restrict wide, const void *restrict raw, enum dtype dtype) {
    switch (dtype) {
    case BF16: widen_as(wide, raw, BF16); break;
    case F16: widen_as(wide, raw, F16); break;
    case F32: widen_as(wide, raw, F32); break;
    default: widen_as(wide, raw, F64);
    }
}

/* Round by way of float, as torch does; return whether a result is infinite or NaN. */
INLINE uint32_t narrow(void *restrict raw, const double *restrict wide, enum dtype dtype) {
    uint16_t *restrict shorts = raw;
    float *restrict floats = raw;
    uint32_t nonfinite = 0;
    switch (dtype) {
    case BF16:
        for (int i = 0; i < STRIP; i++) {
            uint32_t bits = bits_of((float)wide[i]);
            uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1); /* to nearest, ties to even */
            shorts[i] = (uint16_t)(rounded >> 16);
            nonfinite |= (bits & 0x7f800000) == 0x7f800000;
            nonfinite |= (rounded & 0x7f800000) == 0x7f800000;
        }
        break;
    case F16:
        for (int i = 0; i < STRIP; i++) {
            shorts[i] = half_of_float((float)wide[i]);
            nonfinite |= (shorts[i] & 0x7c00) == 0x7c00;
        }
        break;
    case F32:
        for (int i = 0; i < STRIP; i++) {
            floats[i] = (float)wide[i];
            nonfinite |= (bits_of(floats[i]) & 0x7f800000) == 0x7f800000;
        }
        break;
    default:
        memcpy(raw, wide, STRIP * sizeof *wide);
        for (int i = 0; i < STRIP; i++) nonfinite |= !(fabs(wide[i]) <= 0x1.fffffffffffffp1023);
    }
    return nonfinite;
}

/* How a checkpoint is folded into an average: shadow - (1 - decay) * (shadow - value), as one fused
   multiply-add; of the two forms of torch's lerp, each decay takes the one that lerp takes. */
enum kind {
    FIRST,       /* initialises the shadow */
    SKIP,        /* decay 1 */
    COPY,        /* decay 0 */
    FROM_SHADOW, /* decay > 1/2: weight is 1 - decay */
    FROM_VALUE,  /* value - decay * (value - shadow): weight is 1 - (1 - decay) */
    KINDS
};

struct use {
    int64_t average, kind;
    double weight;
};

INLINE double step(double shadow, double value, int64_t kind, double weight) {
    switch (kind) {
    case SKIP: return shadow;
    case FIRST:
    case COPY: return value;
    case FROM_SHADOW: return fma(-(shadow - value), weight, shadow);
    default: return fma(-(value - shadow), weight, value);
    }
}

INLINE void fold_loop(double *restrict shadow, const void *restrict raw, double weight,
                      enum kind kind, enum dtype dtype) {
    for (int i = 0; i < STRIP; i++)
        shadow[i] = step(shadow[i], element(raw, i, dtype), kind, weight);
}

INLINE void fold_as(double *restrict shadow, const void *restrict raw, struct use use,
                    enum dtype dtype) {
    switch (use.kind) {
    case SKIP: break;
    case FIRST:
    case COPY: fold_loop(shadow, raw, use.weight, COPY, dtype); break;
    case FROM_SHADOW: fold_loop(shadow, raw, use.weight, FROM_SHADOW, dtype); break;
    default: fold_loop(shadow, raw, use.weight, FROM_VALUE, dtype);
    }
}

INLINE void fold_strip(double *restrict shadow, const void *restrict raw, struct use use,
                       enum dtype dtype) {
    switch (dtype) {
    case BF16: fold_as(shadow, raw, use, BF16); break;
    case F16: fold_as(shadow, raw, use, F16); break;
    case F32: fold_as(shadow, raw, use, F32); break;
    default: fold_as(shadow, raw, use, F64);
    }
}

/* The same where values may not be finite: infinities that never change stay, as in masks. */
static void fold_keeping(double *shadow, const double *value, struct use use,
                         unsigned char *unchanged) {
    int is_first = use.kind == FIRST;
    for (int i = 0; i < STRIP; i++) {
        int stays = !is_first && isinf(shadow[i]) && shadow[i] == value[i];
        unchanged[i] = is_first ? isinf(value[i]) != 0 : unchanged[i] && stays;
        if (!stays) shadow[i] = step(shadow[i], value[i], use.kind, use.weight);
    }
}

/* Blocks of a few checkpoints, and the averages of the block. */
struct group {
    int64_t strips, inputs, averages;
    const unsigned char *input[GROUP];
    enum dtype input_dtype[GROUP];
    const struct use *uses[GROUP];
    int64_t use_counts[GROUP];
    double *shadow;         /* of a strip: averages x STRIP */
    int64_t shadow_stride;  /* from strip to strip; 0 where nothing is kept between groups */
    int is_last;            /* the averages are rounded */
    unsigned char **output; /* one of each average */
    const int64_t *output_dtype;
    unsigned char *nonfinite; /* one of each average: set where a result is not finite */
};

INLINE void fold_group_body(const struct group *group) {
    double value[STRIP];
    for (int64_t strip = 0; strip < group->strips; strip++) {
        double *shadow = group->shadow + strip * group->shadow_stride;
        for (int64_t i = 0; i < group->inputs; i++) {
            enum dtype dtype = group->input_dtype[i];
            const void *raw = group->input[i] + strip * STRIP * WIDTH[dtype];
            if (group->use_counts[i] > 1) { /* several averages share what is widened */
                widen(value, raw, dtype);
                raw = value;
                dtype = F64;
            }
            for (int64_t u = 0; u < group->use_counts[i]; u++) {
                struct use use = group->uses[i][u];
                fold_strip(shadow + use.average * STRIP, raw, use, dtype);
            }
        }
        for (int64_t k = 0; group->is_last && k < group->averages; k++) {
            enum dtype dtype = (enum dtype)group->output_dtype[k];
            unsigned char *output = group->output[k] + strip * STRIP * WIDTH[dtype];
            group->nonfinite[k] |= (unsigned char)narrow(output, shadow + k * STRIP, dtype);
        }
    }
}

/* The sum of squares, in eight sums. */
INLINE double squares_as(const void *raw, int64_t count, enum dtype dtype) {
    double sums[8] = {0};
    const unsigned char *at = raw;
    for (; count >= 8; count -= 8, at += 8 * WIDTH[dtype])
        for (int i = 0; i < 8; i++) {
            double value = element(at, i, dtype);
            sums[i] = fma(value, value, sums[i]);
        }
    for (int i = 0; i < count; i++) {
        double value = element(at, i, dtype);
        sums[i] = fma(value, value, sums[i]);
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
           ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

INLINE double squares_body(const void *raw, int64_t count, enum dtype dtype) {
    switch (dtype) {
    case BF16: return squares_as(raw, count, BF16);
    case F16: return squares_as(raw, count, F16);
    case F32: return squares_as(raw, count, F32);
    default: return squares_as(raw, count, F64);
    }
}

/* The checksum of float64 values: NH of UMAC (Black et al. 1999, section 4) with one key for all, so
   that any order and any cut into tiles gives the same sum. */
INLINE uint64_t checksum_body(const void *raw, int64_t count) {
    uint64_t sum = 0, word;
    for (int64_t i = 0; i < count; i++) {
        memcpy(&word, (const unsigned char *)raw + i * 8, 8);
        uint32_t low = (uint32_t)word + 0x9e3779b9, high = (uint32_t)(word >> 32) + 0x85ebca6b;
        sum += (uint64_t)low * high;
    }
    return sum;
}

/* Measuring: sums over the elements of several checkpoints, for distances between them. */

enum sum {
    SQUARES,   /* of the values */
    CHANGE,    /* squares of the differences to the checkpoint before */
    TURN,      /* products of these differences and of the differences one checkpoint earlier */
    AWAY,      /* squares of the differences to the average */
    ZEROS,     /* how many */
    NONFINITE, /* how many; they are left out of all other sums */
    LARGEST,   /* the largest difference to the checkpoint before */
    SUMS
};
enum { LANES = 8 };    /* sums that are added up side by side */
enum { TOGETHER = 4 }; /* rows of the Gram matrix that are multiplied with one at a time */
enum { PACKED = 4 };   /* numbers of a pack: compilers keep four of 32 bytes in registers */
typedef double pack __attribute__((vector_size(32), aligned(8), may_alias));

struct measuring {
    int64_t checkpoints, count;   /* elements of each checkpoint */
    const unsigned char *content; /* of all of them */
    const int64_t *place;         /* of each: dtype, where its elements begin */
    const double *weight;         /* of each, in the average */
    int64_t members;              /* checkpoints in the Gram matrix */
    const int64_t *member;
    int64_t strip, every;   /* number of the first strip; one of `every` is sampled */
    double *value;          /* memory of a strip: checkpoints x STRIP */
    double *average, *step; /* STRIP each */
    /* checkpoints x SUMS, the lower triangle of the Gram matrix, elements sampled */
    double *sum;
};

INLINE double sum_of(const double *lane) {
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) +
           ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

/* A difference that is NaN counts as 0 where there may be gaps. */
INLINE double known(double value, int has_gaps) { return has_gaps && value != value ? 0.0 : value; }

/* The sums of one checkpoint over a strip; `step` has the differences one checkpoint earlier. */
INLINE void measure_one(const double *restrict value, const double *restrict before,
                        const double *restrict average, double *restrict step, double *restrict sum,
                        int has_gaps) {
    double squares[LANES] = {0}, change[LANES] = {0}, turn[LANES] = {0}, away[LANES] = {0};
    double zeros[LANES] = {0}, largest[LANES] = {0};
    for (int i = 0; i < STRIP; i += LANES)
        for (int lane = 0; lane < LANES; lane++) {
            double own = value[i + lane], now = known(own - before[i + lane], has_gaps);
            double apart = known(own - average[i + lane], has_gaps);
            double finite = known(own, has_gaps), size = fabs(now);
            squares[lane] += finite * finite;
            change[lane] += now * now;
            turn[lane] += now * step[i + lane];
            away[lane] += apart * apart;
            zeros[lane] += own == 0.0 ? 1.0 : 0.0;
            largest[lane] = size > largest[lane] ? size : largest[lane];
            step[i + lane] = now;
        }
    sum[SQUARES] += sum_of(squares);
    sum[CHANGE] += sum_of(change);
    sum[TURN] += sum_of(turn);
    sum[AWAY] += sum_of(away);
    sum[ZEROS] += sum_of(zeros);
    for (int lane = 0; lane < LANES; lane++)
        if (largest[lane] > sum[LARGEST]) sum[LARGEST] = largest[lane];
}

/* Products of a row with TOGETHER others, whose sums do not wait for each other. */
INLINE void multiply_rows(const double *row, const double *const *other, double *found) {
    pack sums[TOGETHER] = {{0}};
    for (int k = 0; k < STRIP; k += PACKED) {
        pack own = *(const pack *)(const void *)(row + k);
        for (int n = 0; n < TOGETHER; n++)
            sums[n] += own * *(const pack *)(const void *)(other[n] + k);
    }
    for (int n = 0; n < TOGETHER; n++)
        found[n] = (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]);
}

/* Add a strip to the Gram matrix, of the differences to the average. */
INLINE void measure_products(const struct measuring *m, int has_gaps) {
    double *product = m->sum + m->checkpoints * SUMS, found[TOGETHER];
    for (int64_t i = 0; i < m->members; i++) {
        double *row = m->value + m->member[i] * STRIP;
        for (int k = 0; k < STRIP; k++) row[k] = known(row[k] - m->average[k], has_gaps);
        for (int64_t j = 0; j <= i; j += TOGETHER) {
            const double *other[TOGETHER];
            for (int64_t n = 0; n < TOGETHER; n++)
                other[n] = m->value + m->member[j + n < i ? j + n : i] * STRIP;
            multiply_rows(row, other, found);
            for (int64_t n = 0; n < TOGETHER && j + n <= i; n++) *product++ += found[n];
        }
    }
}

/* Whether a strip is sampled: by a hash, since rows of tensors may be a multiple of strips long. */
INLINE int is_sampled(int64_t strip, int64_t every) {
    return ((uint64_t)strip * 2654435761u >> 16 & 0xffff) % (uint64_t)every == 0;
}

INLINE void measure_strip(const struct measuring *m, int64_t used, int64_t strip, int has_gaps) {
    memset(m->step, 0, STRIP * sizeof *m->step);
    for (int64_t k = 0; k < m->checkpoints; k++) {
        const double *value = m->value + k * STRIP, *before = k ? value - STRIP : value;
        measure_one(value, before, m->average, m->step, m->sum + k * SUMS, has_gaps);
        m->sum[k * SUMS + ZEROS] -= (double)(STRIP - used); /* what pads the last strip */
    }
    if (!is_sampled(strip, m->every)) return;
    measure_products(m, has_gaps);
    m->sum[m->checkpoints * SUMS + m->members * (m->members + 1) / 2] += (double)used;
}

/* Count what is not finite, and make it NaN: a gap, over which the others are averaged. */
static void find_gaps(const struct measuring *m) {
    for (int i = 0; i < STRIP; i++) {
        double total = 0.0, weights = 0.0;
        for (int64_t k = 0; k < m->checkpoints; k++) {
            double *value = m->value + k * STRIP + i;
            if (isfinite(*value)) {
                total += m->weight[k] * *value;
                weights += m->weight[k];
            } else {
                *value = NAN;
                m->sum[k * SUMS + NONFINITE] += 1.0;
            }
        }
        m->average[i] = weights != 0.0 ? total / weights : NAN;
    }
}

INLINE void measure_body(const struct measuring *m) {
    int64_t padded[STRIP];
    for (int64_t start = 0, strip = m->strip; start < m->count; start += STRIP, strip++) {
        int64_t used = m->count - start < STRIP ? m->count - start : STRIP;
        uint32_t has_gaps = 0;
        memset(m->average, 0, STRIP * sizeof *m->average);
        for (int64_t k = 0; k < m->checkpoints; k++) {
            enum dtype dtype = (enum dtype)m->place[2 * k];
            const void *raw = m->content + m->place[2 * k + 1] + start * WIDTH[dtype];
            double *restrict value = m->value + k * STRIP, *restrict average = m->average;
            if (used < STRIP) {
                memset(padded, 0, sizeof padded);
                raw = memcpy(padded, raw, (size_t)(used * WIDTH[dtype]));
            }
            widen(value, raw, dtype);
            for (int i = 0; i < STRIP; i++) average[i] += m->weight[k] * value[i];
        }
        /* Of a value that is not finite, the average is not either, whatever the weight. */
        for (int i = 0; i < STRIP; i++) has_gaps |= !(fabs(m->average[i]) <= DBL_MAX);
        if (has_gaps) {
            find_gaps(m);
            measure_strip(m, used, strip, 1);
        } else {
            measure_strip(m, used, strip, 0);
        }
    }
}

/* The same code for what the machine has. */
struct vector {
    const char *name;
    void (*fold_group)(const struct group *);
    double (*squares)(const void *, int64_t, enum dtype);
    uint64_t (*checksum)(const void *, int64_t);
    void (*measure)(const struct measuring *);
};

#define CLONE(NAME, TARGET)                                                                     \
    TARGET static void fold_group_##NAME(const struct group *group) { fold_group_body(group); } \
    TARGET static double squares_##NAME(const void *raw, int64_t count, enum dtype dtype) {     \
        return squares_body(raw, count, dtype);                                                 \
    }                                                                                           \
    TARGET static uint64_t checksum_##NAME(const void *raw, int64_t count) {                    \
        return checksum_body(raw, count);                                                       \
    }                                                                                           \
    TARGET static void measure_##NAME(const struct measuring *m) { measure_body(m); }

CLONE(plain, )
#ifdef __x86_64__
CLONE(v3, __attribute__((target("avx2,fma,f16c"))))
CLONE(v4, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))))
#endif

static const struct vector VECTORS[] = {
/* the widest first */
#ifdef __x86_64__
    {"x86-64-v4", fold_group_v4, squares_v4, checksum_v4, measure_v4},
    {"x86-64-v3", fold_group_v3, squares_v3, checksum_v3, measure_v3},
#endif
#ifdef __aarch64__
    {"neon", fold_group_plain, squares_plain, checksum_plain, measure_plain},
#else
    {"plain", fold_group_plain, squares_plain, checksum_plain, measure_plain},
#endif
};
enum { VECTOR_COUNT = sizeof VECTORS / sizeof *VECTORS };
static const struct vector *vector = &VECTORS[VECTOR_COUNT - 1];

static int is_supported(int place) {
#ifdef __x86_64__
    if (place == 0)
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    if (place == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return place == VECTOR_COUNT - 1;
}

/* Files */

struct file {
    int fd;
    int64_t *heat; /* HEAT numbers that threads share: see `read_at` */
};

enum { MISSED_UNTIL, COLD_UNTIL, ASKED_UNTIL, HEAT };

static const int64_t COLD = 1 << 26;  /* bytes taken to be uncached beyond an uncached place */
static const int64_t ASKED = 1 << 19; /* at a time: kernels cut larger requests down to one */

struct failure {
    enum { NONE, READ, WRITE, STOPPED } what;
    int64_t file, number, offset; /* number: errno, 0 where a file ends */
};

/* Tests have calls fail, or transfer half of what they could, for reads and for writes. */
static struct fault {
    int64_t calls, first, last, injected; /* calls that fail, counted from 1 */
    int error;                            /* 0: half is transferred */
} faults[2] = {{.first = INT64_MAX}, {.first = INT64_MAX}};

/* How many bytes a call may transfer; -1 if it fails, with errno. */
static int64_t allowed(int is_write, int64_t size) {
    struct fault *fault = &faults[is_write];
    int64_t call = __atomic_add_fetch(&fault->calls, 1, __ATOMIC_RELAXED);
    if (call < fault->first || call > fault->last) return size;
    __atomic_add_fetch(&fault->injected, 1, __ATOMIC_RELAXED);
    errno = fault->error;
    return fault->error ? -1 : (size + 1) / 2;
}

static int64_t read_cached(int fd, void *to, int64_t size, int64_t offset) {
#ifdef SYS_preadv2
    struct iovec vector = {.iov_base = to};
    const int nowait = 8; /* RWF_NOWAIT */
    if ((size = allowed(0, size)) < 0) return 0;
    vector.iov_len = (size_t)size;
    long low = (long)offset, high = (long)((uint64_t)offset >> 32);
    return syscall(SYS_preadv2, fd, &vector, 1, low, sizeof low < 8 ? high : 0, nowait);
#else
    (void)fd, (void)to, (void)size, (void)offset;
    return 0;
#endif
}

static void ask_ahead(struct file file, int64_t start, int64_t end, int64_t ahead) {
#ifdef __linux__
    int64_t asked = __atomic_load_n(&file.heat[ASKED_UNTIL], __ATOMIC_RELAXED);
    /* Threads read a little out of order; what is further away was another pass's request. */
    if (asked > end + 2 * ahead) asked = 0;
    if (asked >= end + ahead / 2) return;
    __atomic_store_n(&file.heat[ASKED_UNTIL], end + ahead, __ATOMIC_RELAXED);
    for (int64_t at = start > asked ? start : asked; at < end + ahead; at += ASKED)
        posix_fadvise(file.fd, at, ASKED, POSIX_FADV_WILLNEED);
#else
    (void)file, (void)start, (void)end, (void)ahead;
#endif
}

/* Fill memory from a place of a file. What is not in the page cache is asked for `ahead` bytes
   before it is needed: many files are read in turn, which defeats the kernel's own read-ahead. A
   single miss is not believed: a cached page may be busy. */
static int read_at(struct file file, unsigned char *to, int64_t size, int64_t offset, int64_t ahead,
                   struct failure *failure) {
    int64_t done = 0, end = offset + size;
    if (ahead) {
        int64_t cached = read_cached(file.fd, to, size, offset);
        done = cached > 0 ? cached : 0; /* a real error shows up in the read that may wait */
        int64_t cold_until = offset + COLD;
        if (done < size) {
            if (offset < __atomic_load_n(&file.heat[MISSED_UNTIL], __ATOMIC_RELAXED))
                __atomic_store_n(&file.heat[COLD_UNTIL], cold_until, __ATOMIC_RELAXED);
            __atomic_store_n(&file.heat[MISSED_UNTIL], cold_until, __ATOMIC_RELAXED);
        }
        if (offset < __atomic_load_n(&file.heat[COLD_UNTIL], __ATOMIC_RELAXED))
            ask_ahead(file, offset + done, end, ahead);
    }
    while (done < size) {
        int64_t most = allowed(0, size - done);
        ssize_t count = most < 0 ? -1 : pread(file.fd, to + done, (size_t)most, offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            *failure = (struct failure){READ, 0, count ? errno : 0, offset + done};
            return -1;
        }
        done += count;
    }
    return 0;
}

static int write_at(int fd, const unsigned char *from, int64_t size, int64_t offset,
                    struct failure *failure) {
    for (int64_t done = 0; done < size;) {
        int64_t most = allowed(1, size - done);
        ssize_t count = most < 0 ? -1 : pwrite(fd, from + done, (size_t)most, offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            *failure = (struct failure){WRITE, 0, count ? errno : ENOSPC, offset + done};
            return -1;
        }
        done += count;
    }
    return 0;
}

/* Tensors in pieces: strided views, and chunks in several files. Coordinates count elements. */

struct source {
    enum dtype dtype;
    int64_t axes, pieces;
    const int64_t *shape; /* of the tensor, or of the span: one axis */
    const int64_t *piece; /* each: file, offset in bytes, starts, sizes, strides */
};

struct reads {            /* what reading needs */
    const int64_t *files; /* each: descriptor, number in `heat` */
    int64_t *heat;
    int64_t ahead;        /* bytes to ask for before they are needed, of each file */
    unsigned char *spare; /* for MOST_READ times the elements of a block */
    struct failure *failure;
};

static int64_t product(const int64_t *sizes, int64_t axes) {
    int64_t elements = 1;
    for (int64_t axis = 0; axis < axes; axis++) elements *= sizes[axis];
    return elements;
}

static int is_packed(const int64_t *sizes, const int64_t *strides, int64_t axes) {
    int64_t expected = 1;
    for (int64_t axis = axes - 1; axis >= 0; axis--) {
        if (sizes[axis] != 1 && strides[axis] != expected) return 0;
        expected *= sizes[axis];
    }
    return 1;
}

static void copy_strided(unsigned char *to, const int64_t *to_strides, const unsigned char *from,
                         const int64_t *strides, const int64_t *sizes, int64_t axes,
                         int64_t width) {
    for (int64_t i = 0; i < *sizes; i++) {
        unsigned char *target = to + i * *to_strides * width;
        const unsigned char *origin = from + i * *strides * width;
        if (axes > 1)
            copy_strided(target, to_strides + 1, origin, strides + 1, sizes + 1, axes - 1, width);
        else if (width == 2)
            memcpy(target, origin, 2);
        else if (width == 4)
            memcpy(target, origin, 4);
        else
            memcpy(target, origin, 8);
    }
}

/* Read a box of a piece into place, in parts for which little else is fetched. */
static int read_box(const struct reads *reads, const int64_t *piece, int64_t axes, int64_t width,
                    const int64_t *begins, int64_t *sizes, unsigned char *to,
                    const int64_t *to_strides) {
    const int64_t *starts = piece + 2, *strides = piece + 2 + 2 * axes;
    int64_t wanted = product(sizes, axes), span = 1, place = 0, widest = -1;
    for (int64_t axis = 0; axis < axes; axis++) {
        span += (sizes[axis] - 1) * strides[axis];
        place += (begins[axis] - starts[axis]) * strides[axis];
        int is_wider = widest < 0 || strides[axis] > strides[widest];
        if (sizes[axis] > 1 && is_wider) widest = axis;
    }
    if (span > MOST_READ * wanted) { /* then some axis has more than one element */
        int64_t half[AXES], later[AXES], size = sizes[widest];
        memcpy(half, sizes, (size_t)axes * sizeof *half);
        memcpy(later, begins, (size_t)axes * sizeof *later);
        half[widest] = size / 2;
        if (read_box(reads, piece, axes, width, begins, half, to, to_strides)) return -1;
        later[widest] += size / 2;
        half[widest] = size - size / 2;
        to += size / 2 * to_strides[widest] * width;
        return read_box(reads, piece, axes, width, later, half, to, to_strides);
    }
    int is_direct = is_packed(sizes, strides, axes) && is_packed(sizes, to_strides, axes);
    unsigned char *into = is_direct ? to : reads->spare;
    int64_t offset = piece[1] + place * width;
    const int64_t *of = reads->files + 2 * *piece;
    struct file file = {(int)of[0], reads->heat + HEAT * of[1]};
    if (read_at(file, into, span * width, offset, reads->ahead, reads->failure)) {
        reads->failure->file = *piece;
        return -1;
    }
    if (!is_direct) copy_strided(to, to_strides, into, strides, sizes, axes, width);
    return 0;
}

/* Read elements of a tensor: a range is cut into boxes, each box into its overlaps with pieces. */
static int read_elements(const struct reads *reads, const struct source *source, int64_t start,
                         int64_t count, unsigned char *to) {
    int64_t axes = source->axes, width = WIDTH[source->dtype];
    while (count > 0) {
        int64_t begins[AXES], sizes[AXES], strides[AXES], row = product(source->shape, axes);
        int64_t rest = start, is_inner = 0;
        for (int64_t axis = 0; axis < axes; axis++) {
            row /= source->shape[axis];
            begins[axis] = rest / row;
            rest %= row;
            int64_t rows = rest ? 0 : count / row; /* whole ones */
            int64_t left = source->shape[axis] - begins[axis];
            sizes[axis] = is_inner   ? source->shape[axis]
                          : rows > 1 ? (rows < left ? rows : left)
                                     : 1;
            is_inner |= rows > 0;
        }
        int64_t elements = product(sizes, axes), stride = 1;
        for (int64_t axis = axes - 1; axis >= 0; stride *= sizes[axis--]) strides[axis] = stride;
        for (int64_t number = 0; number < source->pieces; number++) {
            const int64_t *piece = source->piece + number * (2 + 3 * axes);
            int64_t first[AXES], part[AXES], place = 0, is_empty = 0;
            for (int64_t axis = 0; axis < axes; axis++) {
                int64_t from = piece[2 + axis], end = from + piece[2 + axes + axis];
                int64_t stop = begins[axis] + sizes[axis];
                first[axis] = from > begins[axis] ? from : begins[axis];
                part[axis] = (end < stop ? end : stop) - first[axis];
                place += (first[axis] - begins[axis]) * strides[axis];
                is_empty |= part[axis] <= 0;
            }
            if (is_empty) continue;
            unsigned char *into = to + place * width;
            if (read_box(reads, piece, axes, width, first, part, into, strides)) return -1;
        }
        start += elements;
        count -= elements;
        to += elements * width;
    }
    return 0;
}

/* One tile. Arrays of int64_t come from Python; `parse` has checked them. */

struct tile {
    /* The job: how each checkpoint is used. */
    int64_t checkpoints, averages;
    const int64_t *newest;     /* of each average, the number of its newest checkpoint */
    const int64_t *uses_begin; /* of each checkpoint, and the end */
    const struct use *uses;
    /* The span: where its elements are, and where they go. */
    const int64_t *dtypes; /* of each average */
    int64_t places;
    const int64_t *place;        /* each: average, number of an output, offset in bytes */
    const int64_t *source_begin; /* of each checkpoint, in `sources` */
    const int64_t *sources;      /* each: dtype, axes, pieces, shape, then the pieces */
    /* The tile. */
    int64_t start, length;  /* elements of the span */
    int64_t first, count;   /* the checkpoints of this call, of all that a tile takes */
    int64_t segments;       /* tensors, or parts of them, in the tile */
    const int64_t *segment; /* where each begins, and the end; elements of the tile */
    int64_t block;          /* elements in memory at a time, of each checkpoint of a group */
    int64_t keeps_infinities;
    struct reads reads;
    const int64_t *outputs; /* descriptors */
    /* What monitors get. */
    unsigned char *flags;  /* of each segment */
    int64_t *last_nonzero; /* of each checkpoint: the last element of the tile that is not zero */
    uint64_t *hash;        /* of each checkpoint; NULL if none is wanted */
    uint64_t *sums; /* of each checkpoint, then of each average: checksums of what is float64; NULL
                       if none are wanted */
    unsigned char *nonfinite; /* of each average */
    int64_t *problem; /* of each average: the first element that is not finite but changes */
    const unsigned char *stop;
    /* Memory, kept between the calls of one tile. */
    unsigned char *inputs[GROUP], **output, *unchanged, *was_zero;
    double *shadow,
        *heads; /* heads: of each average and segment of a block, the newest's squares */
    struct failure failure;
};

/* Screening: a few cheap looks at each tensor, so that monitors look closer at few. */
enum flag {
    FEW_VALUES = 1, /* eight elements of the first checkpoint have at most two values */
    UNIT = 2,    /* a vector that may have norm 1 in each checkpoint; Python sets it for vectors */
    SHRUNK = 4,  /* an average has less than half of the newest checkpoint's norm */
    EMPTIED = 8, /* zero in a checkpoint, and not in the one before */
    ZERO = 16,   /* zero in the checkpoint before */
    VECTOR = 32, /* of one axis: all of it is looked at; set by Python */
    WHOLE = 64   /* all of a tensor: set by Python */
};

static const double UNIT_LOW = 0.999 * 0.999, UNIT_HIGH = 1.001 * 1.001;

/* Whether all elements are zero; -0.0 is. */
static int is_zero(const unsigned char *raw, int64_t size, int64_t width) {
    const uint64_t signs = width == 2   ? 0x8000800080008000
                           : width == 4 ? 0x8000000080000000
                                        : 0x8000000000000000;
    uint64_t word = 0;
    for (; size >= 8 && !word; raw += 8, size -= 8) {
        memcpy(&word, raw, 8);
        word &= ~signs;
    }
    if (size > 0 && !word) {
        memcpy(&word, raw, (size_t)size);
        word &= ~signs;
    }
    return !word;
}

static int64_t last_nonzero(const unsigned char *raw, int64_t size) {
    uint64_t word;
    for (; size >= 8; size -= 8) {
        memcpy(&word, raw + size - 8, 8);
        if (word) break;
    }
    while (size > 0 && !raw[size - 1]) size--;
    return size - 1;
}

/* Any function that differs for nearly all inputs does: equal hashes of all tiles refuse a run. */
static uint64_t hash_of(const unsigned char *raw, int64_t size, uint64_t hash) {
    const uint64_t prime = 0x9e3779b97f4a7c15;
    uint64_t lane[4] = {hash, hash + 1, hash + 2, hash + 3}, word[4];
    for (; size >= 32; raw += 32, size -= 32) {
        memcpy(word, raw, 32);
        for (int i = 0; i < 4; i++) {
            lane[i] = (lane[i] ^ word[i]) * prime;
            lane[i] ^= lane[i] >> 29;
        }
    }
    for (; size > 0; size--) lane[0] = (lane[0] ^ *raw++) * prime;
    for (int i = 0; i < 4; i++) hash = (hash ^ lane[i]) * prime, hash ^= hash >> 32;
    return hash;
}

static uint64_t bits_at(const unsigned char *raw, int64_t place, int64_t width) {
    uint64_t bits = 0;
    memcpy(&bits, raw + place * width, (size_t)width);
    return bits << (65 - 8 * width) ? bits : 0; /* -0.0 is 0.0 */
}

static int has_few_values(const unsigned char *raw, int64_t count, int64_t width) {
    int64_t stride = count > 8 ? count / 8 : 1;
    uint64_t low = bits_at(raw, 0, width), other = low;
    for (int64_t place = stride; place < count; place += stride) {
        uint64_t bits = bits_at(raw, place, width);
        if (bits != low && bits != other) {
            if (other != low) return 0;
            other = bits;
        }
    }
    return 1;
}

/* A block holds whole segments, or a part of one that is larger. */
struct block {
    int64_t start, length, padded; /* elements of the tile; padded to whole strips */
    int64_t segment, segments;     /* the first one, and how many */
};

static int64_t head_of(const struct tile *tile, const struct block *block, int64_t segment,
                       int64_t *begin) {
    int64_t from = tile->segment[segment], stop = tile->segment[segment + 1];
    int64_t end = block->start + block->length, limit = tile->flags[segment] & VECTOR ? end : HEAD;
    if (from < block->start) return *begin = 0; /* looked at in an earlier block */
    if (stop > end) stop = end;
    *begin = from - block->start;
    return stop - from < limit ? stop - from : limit;
}

static void screen_segment(struct tile *tile, const struct block *block, int64_t number,
                           const unsigned char *raw, enum dtype dtype, int64_t checkpoint) {
    int64_t segment = block->segment + number, width = WIDTH[dtype], begin;
    int64_t count = head_of(tile, block, segment, &begin), newest = 0;
    unsigned char *flags = &tile->flags[segment];
    const unsigned char *head = raw + begin * width;
    if (count && checkpoint == 0 && has_few_values(head, count, width)) *flags |= FEW_VALUES;
    for (int64_t k = 0; k < tile->averages; k++) newest |= tile->newest[k] == checkpoint;
    if (count && (newest || *flags & UNIT)) {
        double squares = vector->squares(head, count, dtype);
        int is_all = *flags & WHOLE && count == tile->segment[segment + 1] - tile->segment[segment];
        if (!(squares <= UNIT_HIGH) || (is_all && squares < UNIT_LOW))
            *flags &= (unsigned char)~UNIT;
        for (int64_t k = 0; k < tile->averages; k++)
            if (tile->newest[k] == checkpoint) tile->heads[k * tile->block + number] = squares;
    }
    /* Of a segment in several blocks, each checkpoint's state is kept until its end. */
    int64_t from = tile->segment[segment], stop = tile->segment[segment + 1];
    int begins = from >= block->start, ends = stop <= block->start + block->length;
    int64_t length = block->length - begin;
    if (ends) length = stop - block->start - begin;
    int zero = is_zero(head, length * width, width);
    unsigned char *was_zero = &tile->was_zero[checkpoint];
    zero = *was_zero = (unsigned char)(zero && (begins || *was_zero));
    if (!ends) return;
    if (zero && checkpoint && !(*flags & ZERO)) *flags |= EMPTIED;
    *flags = (unsigned char)(zero ? *flags | ZERO : *flags & ~ZERO);
}

static void screen_input(struct tile *tile, const struct block *block, const unsigned char *raw,
                         enum dtype dtype, int64_t checkpoint) {
    int64_t width = WIDTH[dtype], last = last_nonzero(raw, block->length * width);
    if (last >= 0) tile->last_nonzero[checkpoint] = block->start + last / width;
    if (tile->hash) {
        uint64_t *hash = &tile->hash[checkpoint];
        *hash = hash_of(raw, block->length * width, *hash);
    }
    if (tile->sums && dtype == F64) tile->sums[checkpoint] += vector->checksum(raw, block->length);
    for (int64_t number = 0; number < block->segments; number++)
        screen_segment(tile, block, number, raw, dtype, checkpoint);
}

static void screen_averages(struct tile *tile, const struct block *block) {
    for (int64_t k = 0; tile->sums && k < tile->averages; k++)
        if (tile->dtypes[k] == F64)
            tile->sums[tile->checkpoints + k] += vector->checksum(tile->output[k], block->length);
    for (int64_t number = 0; number < block->segments; number++) {
        int64_t begin, count = head_of(tile, block, block->segment + number, &begin);
        for (int64_t k = 0; count && k < tile->averages; k++) {
            enum dtype dtype = (enum dtype)tile->dtypes[k];
            const unsigned char *head = tile->output[k] + begin * WIDTH[dtype];
            double newest = tile->heads[k * tile->block + number];
            if (vector->squares(head, count, dtype) <= newest / 4) /* or both are zero */
                tile->flags[block->segment + number] |= SHRUNK;
        }
    }
}

static struct block next_block(const struct tile *tile, int64_t start, int64_t segment) {
    const int64_t *begins = tile->segment;
    struct block block = {start, 0, 0, segment, 1};
    int64_t stop = start + tile->block;
    if (begins[segment + 1] > stop || begins[segment] < start) { /* a part of a large one */
        if (begins[segment + 1] < stop) stop = begins[segment + 1];
    } else {
        while (segment + block.segments < tile->segments &&
               begins[segment + block.segments + 1] <= stop)
            block.segments++;
        stop = begins[segment + block.segments];
    }
    block.length = stop - start;
    block.padded = (block.length + STRIP - 1) / STRIP * STRIP;
    return block;
}

/* The slow way of `fold_group_body`, for tiles with results that are not finite. */
static void fold_group_keeping(struct tile *tile, const struct block *block,
                               const struct group *group) {
    for (int64_t strip = 0; strip < group->strips; strip++) {
        double value[STRIP], *shadow = group->shadow + strip * group->shadow_stride;
        for (int64_t i = 0; i < group->inputs; i++) {
            enum dtype dtype = group->input_dtype[i];
            widen(value, group->input[i] + strip * STRIP * WIDTH[dtype], dtype);
            for (int64_t u = 0; u < group->use_counts[i]; u++) {
                struct use use = group->uses[i][u];
                unsigned char *rows = tile->unchanged + use.average * tile->block;
                fold_keeping(shadow + use.average * STRIP, value, use, rows + strip * STRIP);
            }
        }
        for (int64_t k = 0; group->is_last && k < group->averages; k++) {
            enum dtype dtype = (enum dtype)group->output_dtype[k];
            unsigned char *output = group->output[k] + strip * STRIP * WIDTH[dtype];
            const unsigned char *unchanged = tile->unchanged + k * tile->block + strip * STRIP;
            double *row = shadow + k * STRIP;
            for (int i = 0; i < STRIP; i++) row[i] = isnan(row[i]) ? NAN : row[i]; /* one NaN */
            group->nonfinite[k] |= (unsigned char)narrow(output, row, dtype);
            widen(value, output, dtype);
            for (int64_t i = 0; i < STRIP && tile->problem[k] < 0; i++)
                if (!isfinite(value[i]) && !unchanged[i] && strip * STRIP + i < block->length)
                    tile->problem[k] = block->start + strip * STRIP + i;
        }
    }
}

static struct source source_of(const struct tile *tile, int64_t checkpoint) {
    const int64_t *packed = tile->sources + tile->source_begin[checkpoint];
    return (struct source){(enum dtype)packed[0], packed[1], packed[2], packed + 3,
                           packed + 3 + packed[1]};
}

static int read_group(struct tile *tile, const struct block *block, struct group *group,
                      int64_t first) {
    for (int64_t i = 0; i < group->inputs; i++) {
        int64_t checkpoint = first + i;
        struct source source = source_of(tile, checkpoint);
        int64_t width = WIDTH[source.dtype], used = block->length * width;
        unsigned char *raw = tile->inputs[i];
        if (read_elements(&tile->reads, &source, tile->start + block->start, block->length, raw))
            return -1;
        memset(raw + used, 0, (size_t)(block->padded * width - used));
        const int64_t *begin = tile->uses_begin + checkpoint;
        group->input[i] = raw;
        group->input_dtype[i] = source.dtype;
        group->uses[i] = tile->uses + begin[0];
        group->use_counts[i] = begin[1] - begin[0];
        screen_input(tile, block, raw, source.dtype, checkpoint);
    }
    return 0;
}

static int fold_block(struct tile *tile, const struct block *block) {
    int is_one_group = tile->count <= GROUP && tile->count == tile->checkpoints;
    for (int64_t done = 0; done < tile->count; done += GROUP) {
        int64_t left = tile->count - done, first = tile->first + done;
        struct group group = {.strips = block->padded / STRIP,
                              .inputs = left < GROUP ? left : GROUP,
                              .averages = tile->averages,
                              .shadow = tile->shadow,
                              .shadow_stride = is_one_group ? 0 : tile->averages * STRIP,
                              .is_last = first + left == tile->checkpoints && left <= GROUP,
                              .output = tile->output,
                              .output_dtype = tile->dtypes,
                              .nonfinite = tile->nonfinite};
        if (*(const volatile unsigned char *)tile->stop) {
            tile->failure.what = STOPPED;
            return -1;
        }
        if (read_group(tile, block, &group, first)) return -1;
        if (tile->keeps_infinities)
            fold_group_keeping(tile, block, &group);
        else
            vector->fold_group(&group);
        if (!group.is_last) continue;
        screen_averages(tile, block);
        for (int64_t i = 0; i < tile->places; i++) {
            const int64_t *place = tile->place + 3 * i, k = place[0],
                          width = WIDTH[tile->dtypes[k]];
            int64_t offset = place[2] + (tile->start + block->start) * width;
            int fd = (int)tile->outputs[place[1]];
            if (!write_at(fd, tile->output[k], block->length * width, offset, &tile->failure))
                continue;
            tile->failure.file = place[1];
            return -1;
        }
    }
    return 0;
}

static int fold_tile(struct tile *tile) {
    for (int64_t start = 0, segment = 0; start < tile->length;) {
        struct block block = next_block(tile, start, segment);
        if (fold_block(tile, &block)) return -1;
        start += block.length;
        while (segment < tile->segments && tile->segment[segment + 1] <= start) segment++;
    }
    return 0;
}

/* The module. Everything that Python passes is checked before it is used. */

static const int64_t MOST = (int64_t)1 << 40; /* of any number that counts something */

struct cursor {
    const int64_t *at, *end;
};

/* The next numbers of an array, each at least `low` and below `high`; NULL if there are none. */
static const int64_t *take(struct cursor *cursor, int64_t count, int64_t low, int64_t high) {
    if (count < 0 || count > cursor->end - cursor->at) return NULL;
    const int64_t *found = cursor->at;
    for (int64_t i = 0; i < count; i++)
        if (found[i] < low || found[i] >= high) return NULL;
    cursor->at += count;
    return found;
}

static int is_aligned(const void *at) { return (uintptr_t)at % sizeof(int64_t) == 0; }

static struct cursor cursor_of(const char *bytes, Py_ssize_t size) {
    const int64_t *at = is_aligned(bytes) ? (const int64_t *)(const void *)bytes : NULL;
    return (struct cursor){at, at ? at + (size_t)size / sizeof *at : NULL};
}

static int parse_job(struct tile *tile, struct cursor job) {
    const int64_t *sizes = take(&job, 2, 1, 1 << 24);
    if (!sizes) return -1;
    tile->checkpoints = sizes[0], tile->averages = sizes[1];
    if (!(tile->newest = take(&job, tile->averages, 0, tile->checkpoints))) return -1;
    if (!(tile->uses_begin = take(&job, tile->checkpoints + 1, 0, MOST))) return -1;
    int64_t uses = (job.end - job.at) / 3;
    tile->uses = (const struct use *)(const void *)job.at;
    for (int64_t i = 0; i <= tile->checkpoints; i++) {
        int64_t begin = i ? tile->uses_begin[i - 1] : 0;
        if (tile->uses_begin[i] < begin || tile->uses_begin[i] > uses) return -1;
    }
    for (int64_t i = 0; i < uses; i++) {
        struct use use = tile->uses[i];
        if (use.average < 0 || use.average >= tile->averages) return -1;
        if (use.kind < 0 || use.kind >= KINDS) return -1;
    }
    return 0;
}

static int parse_source(const struct tile *tile, struct cursor span, int64_t begin, int64_t files) {
    if (begin > span.end - span.at) return -1;
    span.at += begin;
    const int64_t *dtype = take(&span, 1, 0, DTYPES), *axes = take(&span, 1, 1, AXES + 1);
    const int64_t *pieces = dtype && axes ? take(&span, 1, 0, MOST) : NULL;
    const int64_t *shape = pieces ? take(&span, *axes, 0, MOST) : NULL;
    int64_t elements = 1, bytes;
    for (int64_t axis = 0; shape && axis < *axes; axis++)
        if (__builtin_mul_overflow(elements, shape[axis], &elements)) return -1;
    if (!shape || elements > MOST || tile->start + tile->length > elements) return -1;
    for (int64_t number = 0; number < *pieces; number++) {
        const int64_t *piece = take(&span, 1, 0, files);
        if (!piece || !take(&span, 1, 0, INT64_MAX / 2)) return -1;
        const int64_t *box = take(&span, 3 * *axes, 0, MOST), *sizes = box + *axes;
        int64_t most = 0; /* the element that lies farthest in the file */
        for (int64_t axis = 0; box && axis < *axes; axis++) {
            int64_t far;
            if (__builtin_mul_overflow(sizes[axis], sizes[*axes + axis], &far)) return -1;
            if (__builtin_add_overflow(most, far, &most)) return -1;
        }
        if (!box || __builtin_mul_overflow(most, 8, &bytes) || bytes > INT64_MAX / 2) return -1;
    }
    return 0;
}

static int parse_span(struct tile *tile, struct cursor span, int64_t files, int64_t outputs) {
    if (!(tile->dtypes = take(&span, tile->averages, 0, DTYPES))) return -1;
    const int64_t *places = take(&span, 1, 0, MOST);
    if (!places || !(tile->place = take(&span, 3 * *places, 0, INT64_MAX / 2))) return -1;
    tile->places = *places;
    for (int64_t i = 0; i < *places; i++) {
        const int64_t *place = tile->place + 3 * i;
        if (place[0] >= tile->averages || place[1] >= outputs) return -1;
    }
    if (!(tile->source_begin = take(&span, tile->checkpoints, 0, MOST))) return -1;
    tile->sources = span.at;
    for (int64_t i = tile->first; i < tile->first + tile->count; i++)
        if (parse_source(tile, span, tile->source_begin[i], files)) return -1;
    return 0;
}

static int parse_tile(struct tile *tile, struct cursor sizes, struct cursor segments) {
    const int64_t *of = take(&sizes, 7, 0, MOST);
    if (!of || sizes.at != sizes.end) return -1;
    tile->start = of[0], tile->length = of[1], tile->first = of[2], tile->count = of[3];
    tile->block = of[4], tile->reads.ahead = of[5], tile->keeps_infinities = of[6];
    if (tile->length < 1 || tile->count < 1) return -1;
    if (tile->first + tile->count > tile->checkpoints) return -1;
    /* What a call leaves for the next one is of one block. */
    if (tile->count < tile->checkpoints && tile->length > tile->block) return -1;
    if (tile->block < STRIP || tile->block % STRIP || tile->block > 1 << 24) return -1;
    tile->segments = segments.end - segments.at - 1;
    tile->segment = segments.at;
    if (tile->segments < 1 || tile->segment[0] != 0) return -1;
    for (int64_t i = 0; i < tile->segments; i++)
        if (tile->segment[i + 1] <= tile->segment[i]) return -1;
    return tile->segment[tile->segments] == tile->length ? 0 : -1;
}

static int64_t scratch_size(int64_t checkpoints, int64_t averages, int64_t block) {
    int64_t wide = block * (int64_t)sizeof(double);
    int64_t of_average = 3 * wide + block + (int64_t)sizeof(unsigned char *);
    return 64 + (GROUP + MOST_READ) * wide + averages * of_average + checkpoints;
}

static void lay_out(struct tile *tile, unsigned char *at) {
    int64_t wide = tile->block * (int64_t)sizeof(double), averages = tile->averages;
    at += -(uintptr_t)at % 64;
    for (int i = 0; i < GROUP; i++, at += wide) tile->inputs[i] = at;
    tile->reads.spare = at, at += MOST_READ * wide;
    tile->shadow = (double *)(void *)at, at += averages * wide;
    tile->heads = (double *)(void *)at, at += averages * wide;
    unsigned char *rounded = at;
    at += averages * wide;
    tile->output = (unsigned char **)(void *)at, at += averages * (int64_t)sizeof *tile->output;
    for (int64_t k = 0; k < averages; k++) tile->output[k] = rounded + k * wide;
    tile->unchanged = at, at += averages * tile->block;
    tile->was_zero = at;
}

static int64_t length_of(PyObject *bytearray) { return (int64_t)PyByteArray_Size(bytearray); }

static void *memory_of(PyObject *bytearray) { return PyByteArray_AsString(bytearray); }

static const char FOLD[] =
    "fold(job, span, tile, segments, files, outputs, heat, flags, ends, hashes, sums, problems, "
    "nonfinite, stop, scratch) -> (what, file, errno, offset)\n\n"
    "Average a tile of some checkpoints; see ckpt_ema/fold/native.py for what is in each array.";

static PyObject *fold(PyObject *self, PyObject *arguments) {
    (void)self;
    enum { ARRAYS = 6 };
    const char *bytes[ARRAYS];
    Py_ssize_t sizes[ARRAYS];
    PyObject *heat, *flags, *ends, *hashes, *sums, *problems, *nonfinite, *stop, *scratch;
    if (!PyArg_ParseTuple(arguments, "y#y#y#y#y#y#YYYYYYYYY", &bytes[0], &sizes[0], &bytes[1],
                          &sizes[1], &bytes[2], &sizes[2], &bytes[3], &sizes[3], &bytes[4],
                          &sizes[4], &bytes[5], &sizes[5], &heat, &flags, &ends, &hashes, &sums, &problems,
                          &nonfinite, &stop, &scratch))
        return NULL;
    struct cursor array[ARRAYS];
    for (int i = 0; i < ARRAYS; i++) array[i] = cursor_of(bytes[i], sizes[i]);
    int64_t files = (array[4].end - array[4].at) / 2, outputs = array[5].end - array[5].at;
    int64_t number_bytes = sizeof(int64_t), heats = length_of(heat) / number_bytes / HEAT;
    struct tile tile = {.flags = memory_of(flags),
                        .last_nonzero = memory_of(ends),
                        .hash = length_of(hashes) ? memory_of(hashes) : NULL,
                        .sums = length_of(sums) ? memory_of(sums) : NULL,
                        .problem = memory_of(problems),
                        .nonfinite = memory_of(nonfinite),
                        .stop = memory_of(stop),
                        .outputs = array[5].at};
    tile.reads.files = array[4].at;
    tile.reads.heat = memory_of(heat);
    tile.reads.failure = &tile.failure;
    int is_valid = !parse_job(&tile, array[0]) && !parse_tile(&tile, array[2], array[3]) &&
                   !parse_span(&tile, array[1], files, outputs);
    for (int64_t i = 0; is_valid && i < files; i++)
        is_valid = tile.reads.files[2 * i + 1] >= 0 && tile.reads.files[2 * i + 1] < heats;
    is_valid = is_valid && length_of(flags) == tile.segments && length_of(stop) > 0 &&
               length_of(ends) == tile.checkpoints * number_bytes &&
               (!tile.hash || length_of(hashes) == tile.checkpoints * number_bytes) &&
               (!tile.sums ||
                length_of(sums) == (tile.checkpoints + tile.averages) * number_bytes) &&
               length_of(problems) == tile.averages * number_bytes &&
               length_of(nonfinite) == tile.averages && is_aligned(tile.last_nonzero) &&
               is_aligned(tile.hash) && is_aligned(tile.sums) && is_aligned(tile.problem) && is_aligned(tile.reads.heat) &&
               length_of(scratch) >= scratch_size(tile.checkpoints, tile.averages, tile.block);
    if (!is_valid) {
        PyErr_SetString(PyExc_ValueError, "fold: the arrays do not fit together");
        return NULL;
    }
    lay_out(&tile, memory_of(scratch));
    Py_BEGIN_ALLOW_THREADS fold_tile(&tile);
    Py_END_ALLOW_THREADS struct failure failure = tile.failure;
    return Py_BuildValue("iLLL", failure.what, (long long)failure.file, (long long)failure.number,
                         (long long)failure.offset);
}

static PyObject *scratch_bytes(PyObject *self, PyObject *arguments) {
    (void)self;
    long long checkpoints, averages, block;
    if (!PyArg_ParseTuple(arguments, "LLL", &checkpoints, &averages, &block)) return NULL;
    return PyLong_FromLongLong(scratch_size(checkpoints, averages, block));
}

static int is_content(PyObject *content, int dtype, long long count) {
    int is_valid = dtype >= 0 && dtype < DTYPES && count >= 0 && count < MOST &&
                   length_of(content) >= count * WIDTH[dtype];
    if (!is_valid) PyErr_SetString(PyExc_ValueError, "the content and its dtype do not fit");
    return is_valid;
}

/* The values of a strip, from place `start` on; how many of them there are. */
static int64_t load(double *value, PyObject *content, enum dtype dtype, int64_t start,
                    int64_t count) {
    double padded[STRIP] = {0};
    int64_t left = count - start < STRIP ? count - start : STRIP, width = WIDTH[dtype];
    memcpy(padded, (char *)memory_of(content) + start * width, (size_t)(left * width));
    widen(value, padded, dtype);
    return left;
}

static PyObject *describe(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *content;
    int dtype;
    long long count;
    if (!PyArg_ParseTuple(arguments, "YiL", &content, &dtype, &count)) return NULL;
    if (!is_content(content, dtype, count)) return NULL;
    double value[STRIP], squares = 0.0, low = INFINITY, high = -INFINITY;
    long long others = 0, nans = 0, infinities = 0;
    Py_BEGIN_ALLOW_THREADS for (int64_t start = 0; start < count; start += STRIP) {
        int64_t left = load(value, content, (enum dtype)dtype, start, count);
        for (int64_t i = 0; i < left; i++) {
            squares = fma(value[i], value[i], squares);
            if (value[i] < low) low = value[i];
            if (value[i] > high) high = value[i];
            nans += isnan(value[i]) != 0;
            infinities += isinf(value[i]) != 0;
        }
    }
    for (int64_t start = 0; start < count; start += STRIP) {
        int64_t left = load(value, content, (enum dtype)dtype, start, count);
        for (int64_t i = 0; i < left; i++) others += value[i] != low && value[i] != high;
    }
    Py_END_ALLOW_THREADS return Py_BuildValue("dddLLL", squares, low, high, others, nans,
                                              infinities);
}

static PyObject *distance(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *one, *other;
    int dtype, other_dtype;
    long long count;
    if (!PyArg_ParseTuple(arguments, "YiYiL", &one, &dtype, &other, &other_dtype, &count))
        return NULL;
    if (!is_content(one, dtype, count) || !is_content(other, other_dtype, count)) return NULL;
    double value[STRIP], there[STRIP], squares = 0.0;
    Py_BEGIN_ALLOW_THREADS for (int64_t start = 0; start < count; start += STRIP) {
        int64_t left = load(value, one, (enum dtype)dtype, start, count);
        load(there, other, (enum dtype)other_dtype, start, count);
        for (int64_t i = 0; i < left; i++) {
            double difference = value[i] - there[i];
            squares = fma(difference, difference, squares);
        }
    }
    Py_END_ALLOW_THREADS return PyFloat_FromDouble(squares);
}

static PyObject *checksum(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *content;
    long long count;
    if (!PyArg_ParseTuple(arguments, "YL", &content, &count)) return NULL;
    if (!is_content(content, F64, count)) return NULL;
    uint64_t sum;
    Py_BEGIN_ALLOW_THREADS sum = vector->checksum(memory_of(content), count);
    Py_END_ALLOW_THREADS return PyLong_FromUnsignedLongLong(sum);
}

/* The memory that `measure` needs, and that of its totals, in doubles. */
static int64_t measure_memory(int64_t checkpoints) { return (checkpoints + 2) * STRIP + LANES; }

static int64_t measure_totals(int64_t checkpoints, int64_t members) {
    return checkpoints * SUMS + members * (members + 1) / 2 + 1;
}

/* Add what a call has found to totals of two doubles each, which lose nothing that matters: the
   order in which threads get their work changes no digit. Knuth's two-sum. */
static void add_totals(double *total, const double *sum, int64_t count, int64_t of_checkpoints) {
    for (int64_t i = 0; i < count; i++, total += 2) {
        if (i < of_checkpoints && i % SUMS == LARGEST) {
            if (sum[i] > *total) *total = sum[i];
            continue;
        }
        double high = total[0] + sum[i], part = high - total[0];
        total[1] += (total[0] - (high - part)) + (sum[i] - part);
        total[0] = high;
    }
}

/* Return whether `numbers` and `content` describe elements that lie in the content. */
static int parse_measuring(struct measuring *m, struct cursor numbers, PyObject *content) {
    const int64_t *sizes = take(&numbers, 5, 0, MOST);
    if (!sizes) return -1;
    m->checkpoints = sizes[0], m->members = sizes[1], m->count = sizes[2];
    m->strip = sizes[3], m->every = sizes[4];
    if (m->checkpoints < 1 || m->checkpoints > 1 << 24 || m->members > m->checkpoints) return -1;
    if (m->every < 1) return -1;
    if (!(m->place = take(&numbers, 2 * m->checkpoints, 0, MOST))) return -1;
    if (!(m->member = take(&numbers, m->members, 0, m->checkpoints))) return -1;
    if (numbers.at != numbers.end) return -1;
    for (int64_t i = 1; i < m->members; i++)
        if (m->member[i] <= m->member[i - 1]) return -1;
    for (int64_t k = 0; k < m->checkpoints; k++) {
        int64_t dtype = m->place[2 * k], begin = m->place[2 * k + 1];
        if (dtype >= DTYPES || begin + m->count * WIDTH[dtype] > length_of(content)) return -1;
        if (begin % WIDTH[dtype]) return -1;
    }
    m->content = memory_of(content);
    return is_aligned(m->content) ? 0 : -1;
}

static const char MEASURE[] =
    "measure(content, numbers, weights, totals, scratch): add sums over the elements of several\n"
    "checkpoints to totals; see ckpt_ema/measure/sums.py for what is in each array.";

static PyObject *measure(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *content, *totals, *scratch;
    const char *numbers, *weights;
    Py_ssize_t numbers_size, weights_size;
    if (!PyArg_ParseTuple(arguments, "Yy#y#YY", &content, &numbers, &numbers_size, &weights,
                          &weights_size, &totals, &scratch))
        return NULL;
    struct measuring m = {.weight = (const double *)(const void *)weights};
    int is_valid = !parse_measuring(&m, cursor_of(numbers, numbers_size), content);
    int64_t count = is_valid ? measure_totals(m.checkpoints, m.members) : 0, wide = sizeof(double);
    is_valid = is_valid && is_aligned(weights) && weights_size == m.checkpoints * wide &&
               is_aligned(memory_of(totals)) && length_of(totals) == 2 * count * wide &&
               length_of(scratch) >= (measure_memory(m.checkpoints) + count) * wide;
    if (!is_valid) {
        PyErr_SetString(PyExc_ValueError, "measure: the arrays do not fit together");
        return NULL;
    }
    unsigned char *at = memory_of(scratch);
    m.value = (double *)(void *)(at + -(uintptr_t)at % 64);
    m.average = m.value + m.checkpoints * STRIP;
    m.step = m.average + STRIP;
    m.sum = m.step + STRIP;
    Py_BEGIN_ALLOW_THREADS memset(m.sum, 0, (size_t)(count * wide));
    vector->measure(&m);
    add_totals(memory_of(totals), m.sum, count, m.checkpoints * SUMS);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyObject *measure_bytes(PyObject *self, PyObject *arguments) {
    (void)self;
    long long checkpoints, members;
    if (!PyArg_ParseTuple(arguments, "LL", &checkpoints, &members)) return NULL;
    long long count = measure_totals(checkpoints, members), wide = sizeof(double);
    return Py_BuildValue("LL", 2 * count * wide, (measure_memory(checkpoints) + count) * wide);
}

INLINE int64_t differing_as(const unsigned char *one, const unsigned char *other, int64_t count,
                            int64_t width) {
    int64_t different = 0;
    if (!memcmp(one, other, (size_t)(count * width))) return 0;
    for (int64_t i = 0; i < count * width; i += width)
        different += memcmp(one + i, other + i, (size_t)width) != 0;
    return different;
}

static PyObject *differing(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *content;
    long long begin, count, width, different = 0;
    if (!PyArg_ParseTuple(arguments, "YLLL", &content, &begin, &count, &width)) return NULL;
    int is_valid = begin >= 0 && count >= 0 && count < MOST && width >= 1 && width <= 16 &&
                   begin < MOST && length_of(content) >= begin + count * width &&
                   begin >= count * width;
    if (!is_valid) {
        PyErr_SetString(PyExc_ValueError, "differing: the content is too short");
        return NULL;
    }
    const unsigned char *one = memory_of(content), *other = one + begin;
    Py_BEGIN_ALLOW_THREADS switch (width) {
    case 1: different = differing_as(one, other, count, 1); break;
    case 2: different = differing_as(one, other, count, 2); break;
    case 4: different = differing_as(one, other, count, 4); break;
    case 8: different = differing_as(one, other, count, 8); break;
    default: different = differing_as(one, other, count, width);
    }
    Py_END_ALLOW_THREADS return PyLong_FromLongLong(different);
}

static PyObject *vectors(PyObject *self, PyObject *arguments) {
    (void)self, (void)arguments;
    PyObject *found = PyList_New(0);
    for (int i = 0; found && i < VECTOR_COUNT; i++) {
        PyObject *name = is_supported(i) ? PyUnicode_FromString(VECTORS[i].name) : NULL;
        if (name && PyList_Append(found, name)) Py_CLEAR(found);
        Py_XDECREF(name);
    }
    return found;
}

static PyObject *current_vector(PyObject *self, PyObject *arguments) {
    (void)self, (void)arguments;
    return PyUnicode_FromString(vector->name);
}

static PyObject *use_vector(PyObject *self, PyObject *arguments) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(arguments, "s", &name)) return NULL;
    for (int i = 0; i < VECTOR_COUNT; i++)
        if (is_supported(i) && !strcmp(name, VECTORS[i].name)) {
            vector = &VECTORS[i];
            Py_RETURN_NONE;
        }
    PyErr_SetString(PyExc_ValueError, "this machine has no such vector unit");
    return NULL;
}

static PyObject *fail(PyObject *self, PyObject *arguments) {
    (void)self;
    int is_write, error;
    long long first, last;
    if (!PyArg_ParseTuple(arguments, "pLLi", &is_write, &first, &last, &error)) return NULL;
    faults[is_write] = (struct fault){.first = first, .last = last, .error = error};
    Py_RETURN_NONE;
}

static PyObject *count_call(PyObject *self, PyObject *arguments) {
    (void)self;
    int is_write;
    if (!PyArg_ParseTuple(arguments, "p", &is_write)) return NULL;
    int64_t size = allowed(is_write, 2);
    struct fault fault = faults[is_write];
    return Py_BuildValue("LLi", (long long)fault.calls, (long long)fault.injected, size != 2);
}

static PyMethodDef METHODS[] = {
    {"fold", fold, METH_VARARGS, FOLD},
    {"scratch_bytes", scratch_bytes, METH_VARARGS,
     "scratch_bytes(checkpoints, averages, block) -> the memory that `fold` needs"},
    {"describe", describe, METH_VARARGS,
     "describe(content, dtype, count) -> (sum of squares, lowest, highest, how many are neither,"
     " NaNs, infinities)"},
    {"distance", distance, METH_VARARGS,
     "distance(content, dtype, content, dtype, count) -> the sum of the squares of differences"},
    {"checksum", checksum, METH_VARARGS,
     "checksum(content, count) -> the checksum of float64 values, which is that of any order"},
    {"measure", measure, METH_VARARGS, MEASURE},
    {"measure_bytes", measure_bytes, METH_VARARGS,
     "measure_bytes(checkpoints, members) -> the sizes of `totals` and of `scratch`"},
    {"differing", differing, METH_VARARGS,
     "differing(content, begin, count, width) -> how many of the first `count` elements differ from"
     " those at `begin`"},
    {"vector", current_vector, METH_NOARGS, "vector() -> the name of the vector code in use"},
    {"vectors", vectors, METH_NOARGS, "vectors() -> what this machine has, the widest first"},
    {"use_vector", use_vector, METH_VARARGS, "use_vector(name): for tests, which compare them"},
    {"fail", fail, METH_VARARGS,
     "fail(is_write, first, last, errno): for tests, which have some calls fail"},
    {"count_call", count_call, METH_VARARGS,
     "count_call(is_write) -> (calls so far with this one, calls that failed, whether this fails)"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT,
                                    "_compiled",
                                    "The fold on the CPU.",
                                    -1,
                                    METHODS,
                                    NULL,
                                    NULL,
                                    NULL,
                                    NULL};

PyMODINIT_FUNC PyInit__compiled(void) {
#ifdef __x86_64__
    __builtin_cpu_init();
#endif
    for (int i = VECTOR_COUNT - 1; i >= 0; i--)
        if (is_supported(i)) vector = &VECTORS[i];
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddStringConstant(module, "VERSION", CKPT_EMA_VERSION)) Py_CLEAR(module);
    return module;
}
