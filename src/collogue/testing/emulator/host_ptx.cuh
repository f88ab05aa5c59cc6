// kernels/ptx.cuh for the emulator: the same functions, on the CPU. Compiled under the name of the file that it stands in for.
// Every function that another thread can notice is a scheduling point.
#pragma once
#include <cmath>
#include <cstring>

#include "machine.hpp"
#include "types.cuh"

#define COLLOGUE_DEVICE inline
#define COLLOGUE_SHARED(type, name) type& name = *static_cast<type*>(::collogue::shared_memory(sizeof(type)))
#define COLLOGUE_HAS_CLUSTERS 1
#define COLLOGUE_HAS_E4M3_CONVERSION 0
#define COLLOGUE_HAS_E2M1_CONVERSION 0
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

namespace collogue {

using emulator::machine;
inline emulator::Fibre& self() { return *machine->current; }

// One variable per kernel, of every CTA its own, filled with what no test expects.
inline void* shared_memory(std::size_t bytes) {
  emulator::Cta& cta = *self().cta;
  if (!cta.shared) {
    cta.shared.reset(new u8[bytes]);
    cta.shared_bytes = bytes;
    std::memset(cta.shared.get(), 0xa5, bytes);
  }
  return cta.shared.get();
}

// ---- bits and lanes

// The GPU's arithmetic knows one NaN, the host's many. (A NaN that no arithmetic has touched keeps its payload on a GPU.)
inline u32 bits(float x) {
  u32 r;
  std::memcpy(&r, &x, 4);
  return x != x ? 0x7fffffffu : r;
}
inline float from_bits(u32 x) {
  float r;
  std::memcpy(&r, &x, 4);
  return r;
}
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float square_root(float x) { return std::sqrt(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
inline u32 ones(u32 x) { return static_cast<u32>(__builtin_popcount(x)); }

inline u32 thread_index() { return self().thread; }
inline u32 thread_count() { return self().cta->kernel->threads; }
inline u32 block_in_row() { return self().cta->x; }
inline u32 blocks_in_row() { return self().cta->kernel->cluster_size; }
inline u32 grid_row() { return self().cta->y; }
inline u32 grid_rows() { return self().cta->kernel->rows; }

inline void sync_block() {
  emulator::Cta& cta = *self().cta;
  if (++cta.at_block_barrier == cta.kernel->threads) {
    cta.at_block_barrier = 0;
    machine->join_stores(cta.fibres.data(), cta.kernel->threads);
    machine->wake(cta.block_waiters);
    machine->point();
  } else {
    machine->block_on(cta.block_waiters);
  }
}

// Returns in every lane when all have come; the last to come calls `finish` before.
template <class Finish>
void meet_in_warp(emulator::Collective collective, u32 detail, Finish finish) {
  emulator::Fibre& lane = self();
  emulator::Warp& warp = lane.cta->warps[lane.thread / 32];
  if (warp.arrived && (warp.collective != collective || warp.detail != detail)) machine->fail("lanes of a warp met at different places");
  warp.collective = collective;
  warp.detail = detail;
  if (++warp.arrived < 32) return machine->block(lane);
  warp.arrived = 0;
  finish(warp);
  emulator::Fibre* const first = &lane - lane.thread % 32;
  for (u32 i = 0; i < 32; i++) machine->make_ready(first[i]);
  machine->point();
}
inline bool any_in_warp(bool x) {
  emulator::Fibre& lane = self();
  emulator::Warp& warp = lane.cta->warps[lane.thread / 32];
  warp.value[lane.thread % 32] = x;
  meet_in_warp(emulator::Collective::kAny, 0, [](emulator::Warp& w) {
    w.answer[0] = 0;
    for (u32 value : w.value) w.answer[0] |= value;
  });
  return warp.answer[0];
}
inline u32 exchange_lanes(u32 x, int distance) {
  emulator::Fibre& lane = self();
  emulator::Warp& warp = lane.cta->warps[lane.thread / 32];
  warp.value[lane.thread % 32] = x;
  meet_in_warp(emulator::Collective::kExchange, static_cast<u32>(distance),
               [](emulator::Warp& w) { std::memcpy(w.answer, w.value, sizeof w.value); });
  return warp.answer[lane.thread % 32 ^ static_cast<u32>(distance)];
}
inline float exchange_lanes(float x, int distance) { return from_bits(exchange_lanes(bits(x), distance)); }
// What a lane fences afterwards includes what the others stored before.
inline void sync_warp() {
  emulator::Fibre* const first = &self() - self().thread % 32;
  meet_in_warp(emulator::Collective::kSync, 0, [first](emulator::Warp&) { machine->join_stores(first, 32); });
}
inline u32 of_lane(u32 x, u32 source) {
  emulator::Fibre& lane = self();
  emulator::Warp& warp = lane.cta->warps[lane.thread / 32];
  warp.value[lane.thread % 32] = x;
  meet_in_warp(emulator::Collective::kExchange, 64 + source, [](emulator::Warp& w) { std::memcpy(w.answer, w.value, sizeof w.value); });
  return warp.answer[source];
}
// What one instruction of a converged warp reads at one address: the same for all lanes.
template <class T>
T read_together(emulator::Collective collective, const T* p) {
  emulator::Fibre& lane = self();
  emulator::Warp& warp = lane.cta->warps[lane.thread / 32];
  machine->point();
  meet_in_warp(collective, 0, [p](emulator::Warp& w) { std::memcpy(w.answer, p, sizeof(T)); });
  T value;
  std::memcpy(&value, warp.answer, sizeof(T));
  return value;
}

template <class T>
inline void compute_now(T&) {}
inline void compute_now(u32, u32&) {}
inline u32 keep(u32 x) { return x; }
inline float keep(float x) { return x; }
inline u32 folded(const void* p) {
  const u64 address = reinterpret_cast<u64>(p);
  return static_cast<u32>(address ^ address >> 32);
}

// ---- time

inline u32 clock_cycles() {
  machine->point();
  return static_cast<u32>(machine->tick * 64);
}
inline u64 time_ns() { return read_together(emulator::Collective::kTime, &machine->tick) * emulator::kNanosecondsPerTick; }

// ---- programmatic dependent launch

inline void wait_for_previous_kernel() {
  emulator::Kernel& kernel = *self().cta->kernel;
  machine->point();
  if (!kernel.place) return;
  emulator::Kernel& previous = *machine->ranks[kernel.rank].stream[kernel.place - 1];
  while (!previous.ended) machine->block_on(previous.waiters);
}
// The first thread speaks for its CTA.
inline void launch_next_kernel() {
  emulator::Cta& cta = *self().cta;
  if (!cta.launched_next) cta.kernel->launched_next++;
  cta.launched_next = true;
  machine->point();
}

// ---- global memory

inline Words load(const void* p) {
  Words v;
  std::memcpy(&v, p, 16);
  return v;
}
// To memory that peers see too, words arrive late; to this rank's outputs at once.
inline void store(void* p, const Words& v) {
  if (!machine->is_peer_memory(p, 16)) return machine->store_now(p, &v, 16);
  for (u32 i = 0; i < 4; i++) machine->store_later(static_cast<u8*>(p) + 4 * i, v.w[i]);
  machine->point();
}
inline Words load_peer_written(const void* p) {
  machine->point();
  return load(p);
}
inline void store_to_peer(void* p, const Words& v) {
  for (u32 i = 0; i < 4; i++) machine->store_later(static_cast<u8*>(p) + 4 * i, v.w[i]);
  machine->count_sent(4);
  machine->point();
}
inline u32 load_peer_written_word(const u32* p) {
  machine->point();
  return *p;
}
inline Words load_peer_written_together(const void* p) { return read_together(emulator::Collective::kLoad, static_cast<const Words*>(p)); }
struct Pair {
  u32 w[2];
};
inline Pair load_peer_written_pair(const void* p) {
  machine->point();
  Pair v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_pair_to_peer(void* p, const Pair& v) {
  for (u32 i = 0; i < 2; i++) machine->store_later(static_cast<u8*>(p) + 4 * i, v.w[i]);
  machine->count_sent(2);
  machine->point();
}
inline Pair load_pair_written_together(const void* p) { return load_peer_written_pair(p); }
inline void store_pair_together_to_peer(void* p, const Pair& v) {
  machine->store_pair_later(p, v.w[0], v.w[1]);
  machine->point();
}
inline void store_word(void* p, u32 v) {
  if (machine->is_peer_memory(p, 4)) {
    machine->store_later(p, v);
    machine->point();
  } else {
    machine->store_now(p, &v, 4);
  }
}
inline void store_word_to_peer(u32* p, u32 v) {
  machine->store_later(p, v);
  machine->point();
}
inline void count(u64* p, u64 n) {
  machine->point();
  *p += n;
}
inline u32 claim(u32* p, u32 value) {
  machine->point();
  const u32 was = *p;
  if (was == 0) *p = value;
  return was;
}
inline void fence_system() { machine->fence(); }

// ---- thread-block clusters

inline void cluster_arrive() {
  emulator::Cluster& cluster = *self().cta->cluster;
  machine->point();
  self().cluster_phase = cluster.phase;
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  cluster.phase++;
  machine->wake(cluster.waiters);
}
inline void cluster_wait() {
  emulator::Cluster& cluster = *self().cta->cluster;
  machine->point();
  while (cluster.phase == self().cluster_phase) machine->block_on(cluster.waiters);
}

// Bits 24 and up name the CTA of the cluster.
inline u32 shared_address(const void* p) {
  const emulator::Cta& cta = *self().cta;
  return cta.x << 24 | static_cast<u32>(static_cast<const u8*>(p) - cta.shared.get());
}
template <class T>
T load_own_shared(u32 address) {
  T v;
  std::memcpy(&v, self().cta->shared.get() + (address & 0xffffffu), sizeof v);
  return v;
}
inline u32 load_shared_word(u32 address) { return load_own_shared<u32>(address); }
inline Words load_shared(u32 address) { return load_own_shared<Words>(address); }
inline u32 address_in_cta(u32 address, u32 rank) { return (address & 0xffffffu) | rank << 24; }
inline void barrier_init(u64* barrier) {
  const emulator::Mbarrier clean = {0, 0, 1, emulator::Mbarrier::kMark};
  std::memcpy(barrier, &clean, sizeof clean);
}
inline void publish_barriers() {}
inline void barrier_expect(u64* barrier, u32 bytes) {
  machine->change_barrier(*self().cta, reinterpret_cast<u8*>(barrier), static_cast<int>(bytes), true);
  machine->point();
}
inline void send_word(u32 remote_address, u32 word, u32 remote_barrier) {
  emulator::Cta& cta = *self().cta->cluster->ctas[remote_address >> 24];
  machine->send_to_cta(cta, remote_address & 0xffffffu, word, remote_barrier & 0xffffffu);
  machine->point();
}
inline void barrier_wait(u64* barrier, u32 parity) {
  machine->point();
  for (;;) {
    emulator::Mbarrier state;
    std::memcpy(&state, barrier, sizeof state);
    if ((state.phase & 1u) != parity) return;
    machine->block_on(self().cta->barrier_waiters);
  }
}

// ---- conversions; bfloat16 by integers, float16 by the compiler's own type

inline u32 round_bf16(float x) {
  const u32 b = bits(x);
  return x != x ? 0x7fffu : (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}
inline u32 f16_bits(_Float16 x) {
  u16 r;
  std::memcpy(&r, &x, 2);
  return r;
}
inline float f16_value(u32 x) {
  const u16 half = static_cast<u16>(x);
  _Float16 r;
  std::memcpy(&r, &half, 2);
  return static_cast<float>(r);
}
inline u32 round_f16(float x) { return x != x ? 0x7fffu : f16_bits(static_cast<_Float16>(x)); }
inline u32 round_bf16_pair(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline u32 round_f16_pair(float low, float high) { return round_f16(low) | round_f16(high) << 16; }
// Of both halves: -0 becomes +0, NaN the one NaN, all else stays.
inline u32 clear_negative_zero_pair(u32 x, u32 infinity) {
  u32 r = 0;
  for (u32 shift = 0; shift < 32; shift += 16) {
    const u32 half = x >> shift & 0xffffu;
    r |= ((half & 0x7fffu) > infinity ? 0x7fffu : half == 0x8000u ? 0u : half) << shift;
  }
  return r;
}
inline u32 clear_negative_zero_bf16_pair(u32 x) { return clear_negative_zero_pair(x, 0x7f80u); }
inline u32 clear_negative_zero_f16_pair(u32 x) { return clear_negative_zero_pair(x, 0x7c00u); }
inline void widen_f16_pair(u32 x, float& low, float& high) {
  low = f16_value(x & 0xffffu);
  high = f16_value(x >> 16);
}
inline u32 larger_bf16_pair(u32 a, u32 b) {
  return round_bf16_pair(larger(from_bits(a << 16), from_bits(b << 16)), larger(from_bits(a & 0xffff0000u), from_bits(b & 0xffff0000u)));
}
inline u32 larger_f16_pair(u32 a, u32 b) {
  return round_f16_pair(larger(f16_value(a & 0xffffu), f16_value(b & 0xffffu)), larger(f16_value(a >> 16), f16_value(b >> 16)));
}

}  // namespace collogue
