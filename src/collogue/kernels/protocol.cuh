// Ranks: generations, slots, sentinels, bounded waits, failures. Moves packed words and knows no arithmetic.
//
// Every rank has four generations of N slots. A call writes its words into the slot it owns in generation (call % 4) of every
// peer and reads the slots of its own generation: a word that still holds the sentinel has not arrived. While it waits it
// wipes the generation of the call before, as far as that call used it. A peer can be at most one call ahead (it needs this
// call's words to finish its own), and the wiped generation is written again only three calls after this one.
#pragma once
#include "params.cuh"

namespace collogue {

constexpr u32 kGenerations = 4;
constexpr u32 kDataOffset = 4096;       // of generation 0 in the workspace; control words lie before
constexpr u32 kPollsBetweenLooks = 256;  // at the clock and the stop word
constexpr u32 kNowhere = ~0u;
constexpr u32 kGaveUp = 0x100;           // in Ranks::stopped: this thread's own time is over

// In the first bytes of every workspace.
struct Control {
  u32 used[2];  // by call % 2: 16-byte units that the call wrote into each slot
  u64 counter;  // calls in the high half, warps of the current call that have read these words in the low half
  u32 stop;     // 1 + rank of whoever found a fault, written on every rank: kernels end without sending or waiting
  u32 claimed;  // the failure record has been taken
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

template <class C>
struct Ranks {
  using D = typename C::D;

  const Params& p;
  u8* own;                 // this rank's workspace
  u8* slot[C::kWorld];     // this rank's slot in generation 0 of its k-th next peer
  Words head;              // the control words, as read
  u32 stop;
  u32 call;
  u32 stopped;             // do not send, do not wait; report() says why
  u32 generation;          // byte offset of this call's generation
  u32 late_offset;         // of the vector whose wait was given up

  // Needs no result of the previous kernel.
  COLLOGUE_DEVICE explicit Ranks(const Params& params) : p(params), own(params.workspace[params.rank]), call(0), stopped(0), generation(0), late_offset(kNowhere) {
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) {
      u32 peer = p.rank + k;
      if (peer >= C::kWorld) peer -= C::kWorld;
      slot[k] = p.workspace[peer] + kDataOffset + p.rank * p.slot_bytes;
    }
  }
  COLLOGUE_DEVICE Control* control() const { return reinterpret_cast<Control*>(own); }
  COLLOGUE_DEVICE void compute_pointers_now() {
    compute_now(own);
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) compute_now(slot[k]);
  }
  // After wait_for_previous_kernel(); start() uses what this asks for.
  COLLOGUE_DEVICE void ask() {
    head = load_control(own);
    stop = load_peer_written_word_together(&control()->stop);
  }
  COLLOGUE_DEVICE void start() {
    call = head.w[3];
    compute_now(call);
    stopped = stop;
    generation = call % kGenerations * (p.slot_bytes * C::kWorld);
  }

  // A word that looks like the sentinel travels as zeros: the same sum.
  static COLLOGUE_DEVICE Packed<D::kParts> disguise(Packed<D::kParts> v) {
#pragma unroll
    for (int i = 0; i < D::kParts; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) v.part[i].w[j] = v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j];
    return v;
  }
  // One disguised vector of this rank's term, to every peer.
  COLLOGUE_DEVICE void send(const Packed<D::kParts>& v, u32 offset) const {
    if (stopped) return;
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
    count(&control()->counter, thread == 0 ? (1ull << 32) - (warps - 1) : 1ull);
    if (thread == 0) control()->used[call % 2] = units;
  }

  // The generation of the call before becomes clean again. All threads of the grid together.
  COLLOGUE_DEVICE void wipe(u32 thread, u32 threads) const {
    const Words clean = {{D::kSentinel, D::kSentinel, D::kSentinel, D::kSentinel}};
    const u32 before = (call - 1) % kGenerations;
    const u32 units = call % 2 ? head.w[0] : head.w[1];
    u8* const first = own + kDataOffset + before * (p.slot_bytes * C::kWorld);
#pragma unroll 1
    for (u32 unit = thread; unit < units; unit += threads) {
#pragma unroll
      for (u32 k = 0; k < C::kWorld; k++)
        if (k != p.rank) store(first + k * p.slot_bytes + unit * 16, clean);
    }
  }

  // Whether a word of these vectors still holds the sentinel.
  template <int kCount>
  static COLLOGUE_DEVICE bool any_missing(const Packed<D::kParts> (&vectors)[kCount]) {
    bool missing = false;
#pragma unroll
    for (int b = 0; b < kCount; b++)
#pragma unroll
      for (int i = 0; i < D::kParts; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) missing |= vectors[b].part[i].w[j] == D::kSentinel;
    return missing;
  }

  // Adds every rank's term of one vector in rank order; `mine` is this rank's, disguised. All lanes of the warp together.
  COLLOGUE_DEVICE void receive_and_add(const Packed<D::kParts>& mine, u32 offset, bool active, float (&sum)[8]) {
    // As many terms at a time as registers hold: all of them where a thread has one 16-bit vector.
    constexpr int kMost = (C::kVectors == 1 ? 8 : 4) / D::kParts;
    constexpr int kBatch = C::kWorld < kMost ? C::kWorld : kMost;
    const u8* const slots = own + kDataOffset + (generation + offset);
#pragma unroll
    for (int first = 0; first < C::kWorld; first += kBatch) {
      Packed<D::kParts> term[kBatch];
      u64 started_ns = 0;
      bool missing = true;
      while (missing && !stopped) {
        for (u32 polls = 0; missing && polls < kPollsBetweenLooks; polls++) {
#pragma unroll
          for (int b = 0; b < kBatch; b++) {
            const u32 k = first + b;
            term[b] = mine;
            if (k < C::kWorld && k != p.rank && active) {
#pragma unroll
              for (int i = 0; i < D::kParts; i++) term[b].part[i] = load_peer_written(slots + k * p.slot_bytes + 16 * i);
            }
          }
          missing = any_in_warp(any_missing(term));
        }
        if (missing) {
          // The wait has become long: has a peer stopped the call, is the time over?
          const u64 now = time_ns();
          if (started_ns == 0) started_ns = now;
          const bool late = any_in_warp(now - started_ns > p.timeout_ns);
          stopped = load_peer_written_word_together(&control()->stop) | (late ? kGaveUp : 0u);
          if (late && any_missing(term)) late_offset = offset;
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (first + b == 0)
          begin<D>(sum, term[b]);
        else if (first + b < C::kWorld)
          add<D>(sum, term[b]);
      }
    }
  }

  // At the end of a kernel that stopped: fill the failure record, once per communicator, and tell every rank to stop.
  COLLOGUE_DEVICE void report() const {
    const bool gave_up = stopped & kGaveUp;
    if (gave_up ? late_offset == kNowhere : thread_index() % 32 != 0) return;
    u32 late_rank = C::kWorld;  // stays so if the words have come in the meantime
#pragma unroll 1
    for (u32 k = 0; gave_up && k < C::kWorld; k++) {
      if (k == p.rank) continue;
      const u8* const words = own + kDataOffset + generation + k * p.slot_bytes + late_offset;
      for (int i = 0; i < 4 * D::kParts; i++)
        if (load_peer_written_word(reinterpret_cast<const u32*>(words) + i) == D::kSentinel) late_rank = k;
    }
    if (!claim(&control()->claimed)) return;
    Failure* const f = p.failure;
    f->rank = p.rank;
    f->late_rank = gave_up ? late_rank : stopped - 1;
    f->call = call;
    f->token = gave_up ? late_offset / (p.hidden * D::kBytes) : 0;
    f->stage = kStagePartials;
    f->waited_ms = static_cast<u32>(p.timeout_ns / 1000000u);
    fence_system();
    store_word_to_peer(&f->kind, gave_up ? kTimeout : kStopped);
#pragma unroll 1
    for (u32 k = 0; gave_up && k < C::kWorld; k++) store_word_to_peer(&reinterpret_cast<Control*>(p.workspace[k])->stop, p.rank + 1);
  }
};

}  // namespace collogue
