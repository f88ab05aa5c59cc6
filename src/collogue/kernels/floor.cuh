// Floors: what no call can go under on this machine. Timed by collogue/tools/bench/floors.py; no other kernel uses them.
#pragma once
#include "params.cuh"
#include "ptx.cuh"

namespace collogue {

// The workspace of the floors, in words: one a sender, a cache line apart, then the call counter and the mark of a late peer.
constexpr u32 kFloorStride = 32;
constexpr u32 kFloorCounter = 512;
constexpr u32 kFloorLate = 544;
constexpr u32 kFloorData = 4096;  // bytes; then a slot of slot_bytes for each sender

// What a kernel in a chain costs by itself.
COLLOGUE_DEVICE void empty_floor() {
  wait_for_previous_kernel();
  launch_next_kernel();
}

// One word to every peer and one from every peer. One warp. A word is the number of the call, so nothing is ever cleared: a peer
// that is one call ahead has written a larger one.
template <int kWorld>
COLLOGUE_DEVICE void exchange_floor(const Params& p) {
  u32* const own = reinterpret_cast<u32*>(p.workspace[p.rank]);
  const u32 lane = thread_index();
  const bool has_peer = lane < kWorld && lane != p.rank;
  u32* const slot = has_peer ? reinterpret_cast<u32*>(p.workspace[lane]) + p.rank * kFloorStride : own;
  wait_for_previous_kernel();
  const u32 call = load_peer_written_word(own + kFloorCounter) + 1;
  sync_warp();  // all lanes have read the counter
  launch_next_kernel();
  if (has_peer) store_word_to_peer(slot, call);
  if (lane == 0) count(reinterpret_cast<u64*>(own + kFloorCounter), 1);
  u32 started = 0, polls = 0;
  bool missing;
  do {
    missing = any_in_warp(has_peer && static_cast<int>(load_peer_written_word(own + lane * kFloorStride) - call) < 0);
    if (missing && ++polls % 256 == 0) {
      const u32 now = static_cast<u32>(time_ns() >> 20);
      if (started == 0) started = now;
      if (any_in_warp(now - started > p.timeout)) {
        if (lane == 0) store_word_to_peer(own + kFloorLate, call);
        missing = false;
      }
    }
  } while (missing);
}

// slot_bytes to every peer by 16-byte stores; every word is 1 + the sender's rank.
template <int kWorld>
COLLOGUE_DEVICE void wire_floor(const Params& p) {
  const u32 word = p.rank + 1;
  const Words v = {{word, word, word, word}};
  const u32 threads = grid_rows() * thread_count();
  wait_for_previous_kernel();
  launch_next_kernel();
#pragma unroll 4
  for (u32 unit = grid_row() * thread_count() + thread_index(); unit < p.slot_bytes / 16; unit += threads) {
#pragma unroll
    for (u32 k = 1; k < kWorld; k++) {
      const u32 peer = p.rank + k < kWorld ? p.rank + k : p.rank + k - kWorld;
      store_to_peer(p.workspace[peer] + kFloorData + p.rank * p.slot_bytes + unit * 16, v);
    }
  }
}

}  // namespace collogue
