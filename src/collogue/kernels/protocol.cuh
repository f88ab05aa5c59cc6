// Ranks: generations, slots, sentinels, bounded waits, failures. Moves packed words and knows no arithmetic.
//
// Every rank has four generations of N slots. A call writes its words into the slot it owns in generation (call % 4) of every
// peer and reads the slots of its own generation: a word that still holds the sentinel has not arrived. While it waits it
// wipes the generation of the call before, as far as that call used it. A peer can be at most one call ahead (it needs this
// call's words to finish its own), and its words for the wiped generation come two calls later, after this kernel has ended.
#pragma once
#include "params.cuh"

namespace collogue {

constexpr u32 kGenerations = 4;
constexpr u32 kDataOffset = 4096;       // of generation 0 in the workspace; control words lie before
constexpr u32 kPollsBetweenLooks = 256;  // at the clock and the stop word

// In the first bytes of every workspace.
struct Control {
  u64 counter;             // calls in the high half, warps of the current call that have read it in the low half
  u32 stop;                // 1 + rank of whoever found a fault, written on every rank: kernels end without sending or waiting
  u32 claimed;             // the failure record has been taken
  u32 used[kGenerations];  // 16-byte units that the last call with this generation wrote into each slot
};

// In pinned host memory, one per communicator; written by the first thread that gives up.
struct Failure {
  u32 kind;  // 0: nothing, 1: this rank waited too long, 2: late_rank stopped the group
  u32 rank;
  u32 late_rank;
  u32 call;
  u32 token;
  u32 stage;
  u32 waited_ms;
  u32 reserved;
};

enum FailureKind : u32 { kTimeout = 1, kStopped = 2 };
enum Stage : u32 { kStagePartials = 1 };

// Where a thread waits: for the record.
struct Place {
  u32 call, generation, first_rank, ranks, token, stage;
};

template <class C>
struct Ranks {
  using D = typename C::D;

  const Params& p;
  u8* own;                 // this rank's workspace
  u8* slot[C::kWorld];     // this rank's slot in generation 0 of its k-th next peer
  Words head, used;        // the control words, as read
  u32 call, stopped;
  u32 generation;          // byte offset of this call's generation
  u64 started_ns;

  // Needs no result of the previous kernel.
  COLLOGUE_DEVICE explicit Ranks(const Params& params) : p(params), own(params.workspace[params.rank]), call(0), stopped(0), generation(0), started_ns(0) {
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) {
      u32 peer = p.rank + k;
      if (peer >= C::kWorld) peer -= C::kWorld;
      slot[k] = p.workspace[peer] + kDataOffset + p.rank * p.slot_bytes;
    }
  }
  COLLOGUE_DEVICE void compute_pointers_now() {
    compute_now(own);
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) compute_now(slot[k]);
  }
  // After wait_for_previous_kernel(), before the first load of the call: start() uses what this asks for.
  COLLOGUE_DEVICE void ask() {
    head = load_control(own);
    used = load_control(own + 16);
  }
  COLLOGUE_DEVICE void start() {
    call = head.w[1];
    stopped = head.w[2];
    generation = call % kGenerations * (p.slot_bytes * C::kWorld);
  }

  // One vector of this rank's term, to every peer. A word that looks like the sentinel is sent as zeros: same sum.
  COLLOGUE_DEVICE void send(const Packed<D::kParts>& x, u32 offset) const {
    if (stopped) return;
    Packed<D::kParts> v = x;
#pragma unroll
    for (int i = 0; i < D::kParts; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) v.part[i].w[j] = v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j];
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) {
#pragma unroll
      for (int i = 0; i < D::kParts; i++) store_to_peer(slot[k] + (generation + offset) + 16 * i, v.part[i]);
    }
  }

  // This warp has read the control words and will not again; the last of the grid advances the call number.
  // `thread` of the grid; `units` of 16 bytes go into every slot of this call's generation.
  COLLOGUE_DEVICE void count_warp(u32 thread, u32 warps, u32 units) const {
    if (thread % 32) return;
    count(reinterpret_cast<u64*>(own), thread == 0 ? (1ull << 32) - (warps - 1) : 1ull);
    if (thread == 0) reinterpret_cast<Control*>(own)->used[call % kGenerations] = units;
  }

  // The generation of the call before becomes clean again. All threads of the grid together.
  COLLOGUE_DEVICE void wipe(u32 thread, u32 threads) const {
    const Words clean = {{D::kSentinel, D::kSentinel, D::kSentinel, D::kSentinel}};
    const u32 before = (call - 1) % kGenerations;
    const u32 units = before == 0 ? used.w[0] : before == 1 ? used.w[1] : before == 2 ? used.w[2] : used.w[3];
    u8* const first = own + kDataOffset + before * (p.slot_bytes * C::kWorld);
    for (u32 unit = thread; unit < units; unit += threads) {
#pragma unroll
      for (u32 k = 0; k < C::kWorld; k++)
        if (k != p.rank) store(first + k * p.slot_bytes + unit * 16, clean);
    }
    if (stopped) record_stop(p, own, call, stopped);
  }

  // Adds every rank's term of one vector in rank order; `mine` is this rank's. All lanes of the warp together.
  COLLOGUE_DEVICE void receive_and_add(const Packed<D::kParts>& mine, u32 offset, bool active, u32 token, float (&sum)[8]) {
    constexpr int kBatch = D::kParts == 1 ? (C::kWorld < 8 ? C::kWorld : 8) : (C::kWorld < 4 ? C::kWorld : 4);
    const u8* const slots = own + kDataOffset + (generation + offset);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = 0.0f;
#pragma unroll
    for (int first = 0; first < C::kWorld; first += kBatch) {
      Packed<D::kParts> term[kBatch];
      u32 polls = 0;
      bool missing;
      do {
        missing = false;
#pragma unroll
        for (int b = 0; b < kBatch; b++) {
          const u32 k = first + b;
          term[b] = mine;
          if (k < C::kWorld && k != p.rank && active) {
#pragma unroll
            for (int i = 0; i < D::kParts; i++) {
              term[b].part[i] = load_peer_written(slots + k * p.slot_bytes + 16 * i);
#pragma unroll
              for (int j = 0; j < 4; j++) missing |= term[b].part[i].w[j] == D::kSentinel;
            }
          }
        }
        missing = any_in_warp(missing) && !stopped;
        if (missing && ++polls % kPollsBetweenLooks == 0) {
          if (started_ns == 0) started_ns = time_ns();
          stopped = look(p, own, Place{call, generation, first, kBatch, token, kStagePartials}, offset, started_ns);
        }
      } while (missing);
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (first + b < C::kWorld) add<D>(sum, term[b]);
      }
    }
  }

  // A wait has become long: has a peer stopped the call, is the time over? True, for the whole warp, if the wait is to end.
  static COLLOGUE_DEVICE u32 look(const Params& p, u8* own, Place place, u32 offset, u64 started_ns) {
    const u64 waited = time_ns() - started_ns;
    const u32 stop = load_peer_written_word(&reinterpret_cast<Control*>(own)->stop);
    const bool late = waited > p.timeout_ns;
    if (late && !stop) give_up(p, own, place, offset, waited);
    if (stop) record_stop(p, own, place.call, stop);
    return any_in_warp(stop || late);
  }

  // Another rank has stopped the group: leave that in this rank's record, if it is still free.
  static COLLOGUE_DEVICE void record_stop(const Params& p, u8* own, u32 call, u32 stop) {
    if (thread_index() % 32 || stop == p.rank + 1 || !claim(&reinterpret_cast<Control*>(own)->claimed)) return;
    p.failure->late_rank = stop - 1;
    p.failure->call = call;
    fence_system();
    store_word_to_peer(&p.failure->kind, kStopped);
  }

  // Writes the failure record, once per communicator, and tells every rank to stop.
  static COLLOGUE_DEVICE void give_up(const Params& p, u8* own, const Place& place, u32 offset, u64 waited) {
    Control* const control = reinterpret_cast<Control*>(own);
    u32 late_rank = C::kWorld;
    for (u32 k = place.first_rank; k < place.first_rank + place.ranks && k < C::kWorld; k++) {
      if (k == p.rank) continue;
      bool missing = false;
      for (int i = 0; i < D::kParts; i++) {
        const Words w = load_peer_written(own + kDataOffset + place.generation + k * p.slot_bytes + offset + 16 * i);
        for (int j = 0; j < 4; j++) missing |= w.w[j] == D::kSentinel;
      }
      if (missing && late_rank == C::kWorld) late_rank = k;
    }
    if (late_rank == C::kWorld || !claim(&control->claimed)) return;
    Failure* const f = p.failure;
    f->rank = p.rank;
    f->late_rank = late_rank;
    f->call = place.call;
    f->token = place.token;
    f->stage = place.stage;
    f->waited_ms = static_cast<u32>(waited / 1000000u);
    fence_system();
    store_word_to_peer(&f->kind, kTimeout);
    for (u32 k = 0; k < C::kWorld; k++) store_word_to_peer(&reinterpret_cast<Control*>(p.workspace[k])->stop, p.rank + 1);
  }
};

}  // namespace collogue
