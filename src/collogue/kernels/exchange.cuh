// One float per 256-element block of a row, from the warp that owns the block to every warp of the row: within a CTA by
// shared memory, over a cluster by transactions on an mbarrier. Called by all threads of all CTAs of the row.
#pragma once
#include "ptx.cuh"

namespace collogue {

// What lies in shared memory. Two buffers, used in turn: a CTA may send for the next row while a slower one still reads.
template <class C, bool kUsed>
struct ExchangeBuffer {
  alignas(16) float value[C::kLoop ? 2 : 1][kUsed ? C::kBlocks : 4];
#if COLLOGUE_HAS_CLUSTERS
  u64 barrier[C::kLoop ? 2 : 1];
#endif
};

// keep() where registers are there for it: a thread has one vector of one row.
template <class C, class T>
COLLOGUE_DEVICE T keep_if_room(T x) {
  if constexpr (C::kVectors == 1 && !C::kLoop) return keep(x);
  return x;
}

template <class C, bool kUsed>
struct Exchange {
  ExchangeBuffer<C, kUsed>& buffer;
  u32 blocks;          // of a row
  u32 sends;           // blocks of this warp that this lane sends
  u32 values;          // address of the values in this CTA
  u32 remote;          // this warp's first block in the CTA that this lane sends to
  u32 remote_barrier;

  // Before cluster_arrive() or sync_block(). Blocks past the end of the row are 0 and stay so.
  COLLOGUE_DEVICE Exchange(ExchangeBuffer<C, kUsed>& b, u32 blocks_in_a_row, u32 first_block)
      : buffer(b), blocks(blocks_in_a_row), sends(0), values(0), remote(0), remote_barrier(0) {
    if constexpr (!kUsed) return;
    const u32 lane = thread_index() % 32;
    const bool gives = C::kClustered ? lane < blocks_in_row() : lane == 0;
    sends = keep_if_room<C>(gives && first_block < blocks ? blocks - first_block : 0);
    values = keep_if_room<C>(shared_address(&buffer.value[0][0]));
    constexpr u32 kTurns = C::kLoop ? 2 : 1;
    // Only blocks that nobody sends: a zero and a block from another CTA, to one word, would have no order.
#pragma unroll 1
    for (u32 i = blocks + thread_index(); i < C::kBlocks; i += C::kThreads)
      for (u32 k = 0; k < kTurns; k++) buffer.value[k][i] = 0.0f;
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (C::kClustered) {
      if (thread_index() == 0) {
        for (u32 i = 0; i < kTurns; i++) barrier_init(&buffer.barrier[i]);
        publish_barriers();
        for (u32 i = 0; i < kTurns; i++) barrier_expect(&buffer.barrier[i], blocks * 4);
      }
      const u32 cta = lane < blocks_in_row() ? lane : 0;
      remote = address_in_cta(shared_address(&buffer.value[0][first_block]), cta);
      remote_barrier = address_in_cta(shared_address(&buffer.barrier[0]), cta);
      compute_now(remote);
      compute_now(remote_barrier);
    }
#endif
  }

  // Block `first_block + i` of this warp. Whole warp; `x` is the same in every lane. After cluster_wait() of the start.
  COLLOGUE_DEVICE void send(u32 turn, u32 first_block, u32 i, float x) {
    if (i >= sends) return;
    const u32 odd = C::kLoop ? turn & 1 : 0;
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (C::kClustered) {
      send_word(remote + (odd * C::kBlocks + i) * 4, bits(x), remote_barrier + odd * 8);
      return;
    }
#endif
    buffer.value[odd][first_block + i] = x;
  }

  // When every value of this turn has been sent, the shared-memory address of the first.
  COLLOGUE_DEVICE u32 wait(u32 turn) {
    const u32 odd = C::kLoop ? turn & 1 : 0;
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (C::kClustered) {
      barrier_wait(&buffer.barrier[odd], C::kLoop ? (turn >> 1) & 1u : 0u);
      if (C::kLoop && thread_index() == 0) barrier_expect(&buffer.barrier[odd], blocks * 4);  // for turn + 2
      return values + odd * C::kBlocks * 4;
    }
#endif
    sync_block();
    return values + odd * C::kBlocks * 4;
  }
};

}  // namespace collogue
