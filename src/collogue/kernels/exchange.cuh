// One float per 256-element block of a row, from the warp that owns the block to every warp of the row: within a CTA by
// shared memory, over a cluster by transactions on an mbarrier. Called by all threads of all CTAs of the row.
#pragma once
#include "ptx.cuh"

namespace collogue {

// Two buffers, used in turn: a CTA may send for the next row while a slower one still reads the last.
template <int kBlocks, bool kClustered>
struct RowExchange {
  alignas(16) float value[2][kBlocks];
#if COLLOGUE_HAS_CLUSTERS
  u64 barrier[2];
#endif

  // Before cluster_arrive() or sync_block(), once. Blocks past the end of the row stay 0.
  COLLOGUE_DEVICE void init(u32 blocks) {
    for (u32 i = thread_index(); i < 2 * kBlocks; i += thread_count()) value[i / kBlocks][i % kBlocks] = 0.0f;
#if COLLOGUE_HAS_CLUSTERS
    if (kClustered && thread_index() == 0) {
      for (int i = 0; i < 2; i++) barrier_init(&barrier[i]);
      publish_barriers();
      for (int i = 0; i < 2; i++) barrier_expect(&barrier[i], blocks * 4);
    }
#endif
  }

  // Whole warp; `x` is the same in every lane. After cluster_wait() of the start.
  COLLOGUE_DEVICE void send(u32 turn, u32 block, float x) {
    const u32 lane = thread_index() & 31u;
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (kClustered) {
      if (lane < blocks_in_row())
        send_word(address_in_cta(shared_address(&value[turn & 1][block]), lane), bits(x),
                  address_in_cta(shared_address(&barrier[turn & 1]), lane));
      return;
    }
#endif
    if (lane == 0) value[turn & 1][block] = x;
  }

  // Returns when every block of this turn has been sent. `blocks`: how many the row has.
  COLLOGUE_DEVICE const float* wait(u32 turn, u32 blocks) {
#if COLLOGUE_HAS_CLUSTERS
    if constexpr (kClustered) {
      barrier_wait(&barrier[turn & 1], (turn >> 1) & 1u);
      if (thread_index() == 0) barrier_expect(&barrier[turn & 1], blocks * 4);  // for turn + 2
      return value[turn & 1];
    }
#endif
    sync_block();
    return value[turn & 1];
  }
};

}  // namespace collogue
