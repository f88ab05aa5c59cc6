// The one file that holds inline PTX and compiler intrinsics. Every function is named by what the caller wants;
// what a function does *not* order or check is said beside it.
#pragma once
#include "types.cuh"

#define COLLOGUE_DEVICE __device__ __forceinline__
#define COLLOGUE_SHARED(type, name) __shared__ type name  // one of each per kernel

// Capabilities of the architecture, the only place that asks for it.
#define COLLOGUE_HAS_CLUSTERS (__CUDA_ARCH__ >= 900)  // thread-block clusters, mbarrier transactions, PDL
#define COLLOGUE_HAS_E4M3_CONVERSION (__CUDA_ARCH__ >= 890)
// Before CUDA 12.9 only the last two say that the architecture is one with an `a`.
#if defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL)
#define COLLOGUE_HAS_E2M1_CONVERSION (__CUDA_ARCH__ >= 1000)
#else
#define COLLOGUE_HAS_E2M1_CONVERSION 0
#endif

namespace collogue {

// ---- bits and lanes

COLLOGUE_DEVICE u32 bits(float x) { return __float_as_uint(x); }
COLLOGUE_DEVICE float from_bits(u32 x) { return __uint_as_float(x); }
COLLOGUE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one where one is NaN
COLLOGUE_DEVICE float smaller(float a, float b) { return fminf(a, b); }
COLLOGUE_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
COLLOGUE_DEVICE float reciprocal(float x) { return __frcp_rn(x); }  // 1 / x, correctly rounded
COLLOGUE_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

COLLOGUE_DEVICE u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
COLLOGUE_DEVICE u32 ones(u32 x) { return static_cast<u32>(__popc(x)); }

COLLOGUE_DEVICE u32 thread_index() { return threadIdx.x; }
COLLOGUE_DEVICE u32 thread_count() { return blockDim.x; }
// The grid is (CTAs of a row, rows at once): a cluster is one row of the grid.
COLLOGUE_DEVICE u32 block_in_row() { return blockIdx.x; }
COLLOGUE_DEVICE u32 blocks_in_row() { return gridDim.x; }
COLLOGUE_DEVICE u32 grid_row() { return blockIdx.y; }
COLLOGUE_DEVICE u32 grid_rows() { return gridDim.y; }
COLLOGUE_DEVICE void sync_block() { __syncthreads(); }

// All 32 lanes call the following together.
COLLOGUE_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
COLLOGUE_DEVICE u32 exchange_lanes(u32 x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
COLLOGUE_DEVICE float exchange_lanes(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
COLLOGUE_DEVICE u32 of_lane(u32 x, u32 lane) { return __shfl_sync(0xffffffffu, x, lane); }
COLLOGUE_DEVICE void sync_warp() { __syncwarp(); }

// The value is computed here and not later: keeps address arithmetic in front of a wait.
template <class T>
COLLOGUE_DEVICE void compute_now(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}
COLLOGUE_DEVICE void compute_now(u32& value) { asm volatile("" : "+r"(value)); }
COLLOGUE_DEVICE void compute_now(float& value) { asm volatile("" : "+f"(value)); }
// The same for what `digest` is made of, and the assembler obeys: it moves arithmetic past everything, but no store.
COLLOGUE_DEVICE void compute_now(u32 digest, u32& shared) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(&shared))), "r"(digest) : "memory");
}
// The same value, kept in a register: the assembler would work it out once more where it is used, and wait there. All 32 lanes together.
COLLOGUE_DEVICE u32 keep(u32 x) { return exchange_lanes(x, 0); }
COLLOGUE_DEVICE float keep(float x) { return exchange_lanes(x, 0); }
COLLOGUE_DEVICE u32 folded(const void* p) {
  const u64 address = reinterpret_cast<u64>(p);
  return static_cast<u32>(address ^ address >> 32);
}

// ---- time

COLLOGUE_DEVICE u32 clock_cycles() {
  u32 c;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(c)::"memory");
  return c;
}
COLLOGUE_DEVICE u64 time_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

// ---- programmatic dependent launch

// Returns when every kernel before this one in the stream has ended and its writes are visible.
COLLOGUE_DEVICE void wait_for_previous_kernel() {
#if COLLOGUE_HAS_CLUSTERS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start its prologue. Orders nothing: the next kernel still waits for the end of this one.
COLLOGUE_DEVICE void launch_next_kernel() {
#if COLLOGUE_HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- global memory

COLLOGUE_DEVICE Words load(const void* p) {
  Words v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
  return v;
}
COLLOGUE_DEVICE void store(void* p, const Words& v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
COLLOGUE_DEVICE void store_word(void* p, u32 v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// Of an input, which nobody writes during a call.
COLLOGUE_DEVICE u32 load_input_word(const u32* p) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
COLLOGUE_DEVICE u32 load_input_half(const u8* p) {
  u16 v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
// A word at a time is atomic; the four words of one access may be seen in any order.
COLLOGUE_DEVICE Words load_peer_written(const void* p) {
  Words v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(p)
               : "memory");
  return v;
}
COLLOGUE_DEVICE void store_to_peer(void* p, const Words& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
struct Pair {
  u32 w[2];
};
COLLOGUE_DEVICE Pair load_peer_written_pair(const void* p) {
  Pair v;
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p) : "memory");
  return v;
}
COLLOGUE_DEVICE void store_pair_to_peer(void* p, const Pair& v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
// Eight bytes that arrive together.
COLLOGUE_DEVICE Pair load_pair_written_together(const void* p) {
  Pair v;
  asm volatile("{.reg .b64 x; ld.relaxed.sys.global.b64 x, [%2]; mov.b64 {%0, %1}, x;}" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p) : "memory");
  return v;
}
COLLOGUE_DEVICE void store_pair_together_to_peer(void* p, const Pair& v) {
  asm volatile("{.reg .b64 x; mov.b64 x, {%1, %2}; st.relaxed.sys.global.b64 [%0], x;}" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
}
COLLOGUE_DEVICE u32 load_peer_written_word(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// All 32 lanes together, converged: one instruction, one value for the warp.
COLLOGUE_DEVICE Words load_peer_written_together(const void* p) { return load_peer_written(p); }
COLLOGUE_DEVICE void store_word_to_peer(u32* p, u32 v) { asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// The same (PTX treats a volatile access as relaxed at system scope); the compiler schedules it better than the assembly.
COLLOGUE_DEVICE void store_word_aside(u32* p, u32 v) { *static_cast<volatile u32*>(p) = v; }
// Adds without an answer and without order.
COLLOGUE_DEVICE void count(u64* p, u64 n) { asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(n) : "memory"); }
// Sets *p from 0 to `value`, and returns what was there.
COLLOGUE_DEVICE u32 claim(u32* p, u32 value) { return atomicCAS(p, 0u, value); }
COLLOGUE_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// ---- shared memory

COLLOGUE_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
COLLOGUE_DEVICE u32 load_shared_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
COLLOGUE_DEVICE Words load_shared(u32 address) {
  Words v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "r"(address) : "memory");
  return v;
}

// ---- thread-block clusters

#if COLLOGUE_HAS_CLUSTERS
// Split barrier over the cluster. The arrival orders nothing by itself; see publish_barriers.
COLLOGUE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
COLLOGUE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same shared-memory variable in CTA `rank` of this cluster.
COLLOGUE_DEVICE u32 address_in_cta(u32 address, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// One arrival completes a phase, once the expected bytes have come as well.
COLLOGUE_DEVICE void barrier_init(u64* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Makes initialized barriers visible to the cluster, before cluster_arrive.
COLLOGUE_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
COLLOGUE_DEVICE void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Stores a word in another CTA's shared memory and counts its four bytes on that CTA's barrier.
COLLOGUE_DEVICE void send_word(u32 remote_address, u32 word, u32 remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(remote_address), "r"(word),
               "r"(remote_barrier)
               : "memory");
}
// Returns when the phase has completed; what was sent before is then visible. Not bounded: all senders are in this cluster.
COLLOGUE_DEVICE void barrier_wait(u64* barrier, u32 parity) {
  u32 done;
  do {
    asm volatile(
        "{.reg .pred q; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 q, [%1], %2; selp.u32 %0, 1, 0, q;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
#endif

// ---- conversions; all round to nearest even, NaN becomes 0x7FFF (16 bits) or 0x7F (E4M3)

COLLOGUE_DEVICE u32 round_bf16_pair(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
COLLOGUE_DEVICE u32 round_f16_pair(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// x * 1 + 0: turns -0 into +0 and keeps all else.
COLLOGUE_DEVICE u32 clear_negative_zero_bf16_pair(u32 x) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x3f803f80u), "r"(0u));
  return r;
}
COLLOGUE_DEVICE u32 clear_negative_zero_f16_pair(u32 x) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x3c003c00u), "r"(0u));
  return r;
}
COLLOGUE_DEVICE void widen_f16_pair(u32 x, float& low, float& high) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(x));
}
// Per half: the larger; the other one where one is NaN.
COLLOGUE_DEVICE u32 larger_bf16_pair(u32 a, u32 b) {
  u32 r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
COLLOGUE_DEVICE u32 larger_f16_pair(u32 a, u32 b) {
  u32 r;
  asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
#if COLLOGUE_HAS_E4M3_CONVERSION
// Two codes in the low 16 bits, `low` in bits 0 to 7. Saturating; keeps the sign of zero.
COLLOGUE_DEVICE u32 e4m3_pair(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
#endif
#if COLLOGUE_HAS_E2M1_CONVERSION
// Two codes in the low 8 bits, `low` in bits 0 to 3. Saturating; keeps the sign of zero.
COLLOGUE_DEVICE u32 e2m1_pair(float low, float high) {
  u32 r;
  asm("{.reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, %1, %2; cvt.u32.u8 %0, c;}" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif

}  // namespace collogue
