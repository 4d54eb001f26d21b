"""The copy kernel: its CUDA source, and the numbers that a launch of it needs. Pure; no CUDA here.

Every unit of a plan is made of the same contiguous runs. The kernel sees ``units x runs x words`` as one row of words,
and each thread works out from its word's number which unit, run and word that is: neighbouring threads copy
neighbouring words, whatever the runs' length, and one launch does whatever is scattered.
"""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 256
# Words that a thread has under way at a time.
UNROLL = 4
# Words of one launch: they are counted in 31 bits.
MAX_WORDS = 1 << 30
WORD_TYPES = {16: "uint4", 8: "unsigned long long", 4: "unsigned int", 2: "unsigned short", 1: "unsigned char"}
NAME = "copy_units"

SOURCE = """
// WORD, WORD_BYTES, UNROLL and THREADS are defined by whoever compiles this.

// Exact for all numbers below 2^31: see Divisor.of.
__device__ __forceinline__ unsigned quotient(unsigned number, unsigned multiplier, unsigned shift) {
    return (unsigned)(((unsigned long long)number * multiplier) >> shift);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_units(
    const unsigned long long* __restrict__ run_src,   // [num_runs], address of unit 0's run
    const unsigned long long* __restrict__ run_dst,
    const long long* __restrict__ unit_src,           // [num_units], bytes from unit 0
    const long long* __restrict__ unit_dst,
    unsigned num_words,
    unsigned run_words, unsigned run_multiplier, unsigned run_shift,
    unsigned num_runs, unsigned runs_multiplier, unsigned runs_shift)
{
    const unsigned stride = gridDim.x * (THREADS * UNROLL);
    for (unsigned first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x; first < num_words; first += stride) {
        WORD words[UNROLL];
        WORD* targets[UNROLL];
        #pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            const unsigned number = first + k * THREADS;
            if (number < num_words) {
                const unsigned in_order = quotient(number, run_multiplier, run_shift);
                const unsigned unit = quotient(in_order, runs_multiplier, runs_shift);
                const unsigned run = in_order - unit * num_runs;
                const unsigned long long at = (unsigned long long)(number - in_order * run_words) * WORD_BYTES;
                const WORD* source = (const WORD*)(run_src[run] + unit_src[unit] + at);
                targets[k] = (WORD*)(run_dst[run] + unit_dst[unit] + at);
                words[k] = __ldcs(source);
            }
        }
        #pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (first + k * THREADS < num_words) {
                __stcs(targets[k], words[k]);
            }
        }
    }
}
"""


@dataclass(frozen=True, slots=True)
class Divisor:
    """Division by a constant as a multiplication and a shift."""

    divisor: int
    multiplier: int
    shift: int

    @classmethod
    def of(cls, divisor: int) -> Divisor:
        """Exact for every dividend below 2^31 (Granlund and Montgomery, 1994: round-up method for 31 bits)."""
        assert 1 <= divisor < 1 << 31
        bits = (divisor - 1).bit_length()
        return cls(divisor, -(-(1 << (31 + bits)) // divisor), 31 + bits)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the kernel; pointers are addresses of arrays on the device that runs it.

    Attributes:
        run_src, run_dst: of uint64 [num_runs]
        unit_src, unit_dst: of int64 [num_units]
    """

    word_bytes: int
    run_src: int
    run_dst: int
    unit_src: int
    unit_dst: int
    run_words: int
    num_runs: int
    num_units: int

    @property
    def num_words(self) -> int:
        return self.num_units * self.num_runs * self.run_words

    def grid(self, max_thread_blocks: int) -> int:
        """Thread blocks: no more than there is work for."""
        return max(1, min(max_thread_blocks, -(-self.num_words // (THREADS * UNROLL))))

    def arguments(self) -> tuple[list[int], list[int]]:
        """The kernel's arguments: pointers (64 bits each), then numbers (32 bits each)."""
        run, runs = Divisor.of(self.run_words), Divisor.of(self.num_runs)
        return (
            [self.run_src, self.run_dst, self.unit_src, self.unit_dst],
            [self.num_words, run.divisor, run.multiplier, run.shift, runs.divisor, runs.multiplier, runs.shift],
        )


def source_for(word_bytes: int) -> str:
    """The kernel for words of one size, complete."""
    values = {"WORD": WORD_TYPES[word_bytes], "WORD_BYTES": word_bytes, "UNROLL": UNROLL, "THREADS": THREADS}
    return "".join(f"#define {name} {value}\n" for name, value in values.items()) + SOURCE
