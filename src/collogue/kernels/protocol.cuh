// Ranks: generations, slots, sentinels, headers, bounded waits, failures. Moves packed words and knows no arithmetic.
//
// Every rank has two generations of memory that its peers write. Call c uses generation c % 2: whoever sends something to a
// rank writes it there, in places that follow from the call's arguments. A word that still holds the sentinel has not arrived.
// Every word that is sent is awaited by exactly one thread in the same call, and that thread puts the sentinel back: when a
// kernel has ended, its generation is clean. No rank can finish call c + 1 before every other rank has started it, and so has
// ended call c; so nobody writes a generation for call c + 2 that is still being read for call c.
#pragma once
#include "params.cuh"

namespace collogue {

constexpr u32 kGenerations = 2;
constexpr u32 kHeadersOffset = 256;      // of the headers of the last calls in the workspace: [call % kHeaders][rank]
constexpr u32 kHeaders = 4;
constexpr u32 kJournalOffset = 2048;     // of this rank's headers, more of them: [call % kJournal]
constexpr u32 kJournal = 64;
constexpr u32 kDataOffset = 4096;        // of generation 0
constexpr u32 kPollsBetweenLooks = 256;  // at the clock and the stop word
constexpr u64 kLongWaitNs = 100000000;   // a wait longer than this compares headers
constexpr u64 kMostRelayNs = 250000000;
constexpr u32 kNobody = ~0u;

// In the first bytes of every workspace.
struct Control {
  u64 counter;  // calls in the high half, warps of the current call that have read these words in the low half
  u32 stop;     // Fault << 8 | 1 + rank of whoever found it, written on every rank: kernels end without sending or waiting
  u32 claimed;  // the failure record has been taken
};

enum Fault : u32 { kNoFault = 0, kTimeout = 1, kMismatch = 2 };
constexpr u32 kFoundHere = 0x10000;      // in Ranks::stopped, in place of another rank's stop word: this warp has found it

// In pinned host memory, one per communicator; written by the first thread of a rank that has something to say.
struct Failure {
  u32 fault;      // 0: nothing; see Fault
  u32 rank;       // who found it
  u32 late_rank;  // whom rank waited for, or whose arguments differ
  u32 call;
  u32 token;
  u32 stage;
  u32 waited_ms;
  u32 reserved;
};

// What a wait is for.
enum Stage : u32 { kStagePartials = 1, kStageRows = 2, kStageStart = 3 };

// Headers of the call before, as one lane of a warp reads them.
struct Seen {
  u32 number, hash;
};

template <class C>
struct Ranks {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr int kPeers = C::kWorld - 1;

  const Params& p;
  u8* own;               // this rank's workspace
  u8* slot[C::kWorld];   // this rank's slot in generation 0 of its k-th next peer
  Words head;            // the control words, as read
  u32 call;
  u32 stopped;           // do not send, do not wait; report() says why
  u32 generation;        // byte offset of this call's generation

  // Needs no result of the previous kernel.
  COLLOGUE_DEVICE explicit Ranks(const Params& params)
      : p(params), own(params.workspace[params.rank]), call(0), stopped(0), generation(0) {
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) slot[k] = p.workspace[next_peer(k)] + kDataOffset + position(p.rank, next_peer(k)) * p.slot_bytes;
  }
  COLLOGUE_DEVICE Control* control() const { return reinterpret_cast<Control*>(own); }
  COLLOGUE_DEVICE u32 next_peer(u32 k) const { return p.rank + k < C::kWorld ? p.rank + k : p.rank + k - C::kWorld; }
  // Slots lie one behind the other in order of their senders; nobody has one for itself.
  static COLLOGUE_DEVICE u32 position(u32 sender, u32 receiver) { return sender < receiver ? sender : sender - 1; }
  // Where what `sender` sends in this call arrives.
  COLLOGUE_DEVICE u8* arrivals(u32 sender) const { return own + kDataOffset + generation + position(sender, p.rank) * p.slot_bytes; }

  COLLOGUE_DEVICE void compute_pointers_now() {
    compute_now(own);
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) compute_now(slot[k]);
  }
  // After wait_for_previous_kernel(); start() uses what this asks for.
  COLLOGUE_DEVICE void ask() { head = load_peer_written_together(own); }
  COLLOGUE_DEVICE void start() {
    call = head.w[1];
    compute_now(call);
    stopped = head.w[2];
    generation = call % kGenerations * p.generation_bytes;
  }

  // ---- sending

  // A word that looks like the sentinel travels as zeros: the same sum.
  static COLLOGUE_DEVICE Vector disguise(Vector v) {
#pragma unroll
    for (int i = 0; i < D::kParts; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) v.part[i].w[j] = v.part[i].w[j] == D::kSentinel ? 0u : v.part[i].w[j];
    return v;
  }
  static COLLOGUE_DEVICE void send_vector(u8* target, const Vector& v) {
#pragma unroll
    for (int i = 0; i < D::kParts; i++) store_to_peer(target + 16 * i, v.part[i]);
  }
  // One disguised vector of this rank's term, to every peer. Nothing is written behind the slot, whatever the arguments.
  COLLOGUE_DEVICE void send(const Vector& v, u32 offset) const {
    if (stopped || offset >= p.slot_bytes) return;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) send_vector(slot[k] + (generation + offset), v);
  }
  // The place becomes clean again.
  static COLLOGUE_DEVICE void wipe_vector(u8* place) {
#pragma unroll
    for (int i = 0; i < D::kParts; i++) store(place + 16 * i, Words{{D::kSentinel, D::kSentinel, D::kSentinel, D::kSentinel}});
  }

  // ---- the call's number and header

  // This warp has read the control words and will not again; the last of the grid advances the call number. Thread 0 of the grid
  // tells every rank what this one was called with.
  COLLOGUE_DEVICE void announce(u32 thread, u32 warps) const {
    if (thread % 32) return;
    count(&control()->counter, thread == 0 ? (1ull << 32) - (warps - 1) : 1ull);
    if (thread != 0 || stopped) return;
    Words h[2];
    h[0] = Words{{call + 1, p.tokens, p.hidden, p.first}};
    h[1] = Words{{p.header[0], p.header[1], bits(p.eps) ^ bits(p.weight_offset) * 3u, 0}};
    h[1].w[3] = hash(h);
    const u32 place = kHeadersOffset + (call % kHeaders * kMaxWorld + p.rank) * sizeof(Header);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int k = 0; k < C::kWorld; k++) store_to_peer(p.workspace[next_peer(k)] + place + 16 * i, h[i]);
      store_to_peer(own + kJournalOffset + call % kJournal * sizeof(Header) + 16 * i, h[i]);
    }
  }
  static COLLOGUE_DEVICE u32 hash(const Words (&h)[2]) {
    u32 x = 0;
#pragma unroll
    for (int i = 0; i < 7; i++) x = (x ^ h[i / 4].w[i % 4]) * 0x9e3779b1u;
    return x;
  }
  COLLOGUE_DEVICE const u8* header_of(u32 of_call, u32 rank) const {
    return own + kHeadersOffset + (of_call % kHeaders * kMaxWorld + rank) * sizeof(Header);
  }
  // What every rank was called with in call `of_call`: lane r reads rank r's. The first warp of the grid.
  COLLOGUE_DEVICE Seen look_at_headers(u32 of_call) const {
    const u32 lane = thread_index() % 32;
    Seen seen = {0, 0};
    if (lane < C::kWorld) {
      const u32* const h = reinterpret_cast<const u32*>(header_of(of_call, lane));
      seen.number = load_peer_written_word(h);
      seen.hash = load_peer_written_word(h + 7);
    }
    return seen;
  }
  // Whether another rank's arguments differ from this one's. A header that has not come, or only in part, says nothing. All lanes.
  COLLOGUE_DEVICE void compare_headers(u32 of_call, const Seen& seen) {
    const u32 lane = thread_index() % 32;
    const u32 mine = of_lane(seen.hash, p.rank);
    bool differs = lane < C::kWorld && seen.number == of_call + 1 && seen.hash != mine;
    if (!any_in_warp(differs)) return;
    if (differs) {
      const Words h[2] = {load_peer_written(header_of(of_call, lane)), load_peer_written(header_of(of_call, lane) + 16)};
      differs = h[0].w[0] == of_call + 1 && h[1].w[3] == hash(h) && h[1].w[3] != mine;
    }
    if (!any_in_warp(differs)) return;
    stopped = kFoundHere;
    if (differs) found(kMismatch, lane, of_call, 0, 0);
  }
  // After the sends of this call, and after a while: the call before.
  COLLOGUE_DEVICE Seen look_at_previous_call(u32 warp_of_grid) const {
    return warp_of_grid == 0 && call != 0 ? look_at_headers(call - 1) : Seen{0, 0};
  }
  COLLOGUE_DEVICE void compare_previous_call(u32 warp_of_grid, const Seen& seen) {
    if (warp_of_grid == 0 && call != 0 && !stopped) compare_headers(call - 1, seen);
  }

  // ---- waiting

  // Until `missing()` is false in every lane of the warp, or the call is stopped. `late(b)`: whether the b-th of `kCount` senders is
  // missing in this lane, `sender(b)`: its rank. All lanes together.
  template <int kCount, class Missing, class Late, class Sender>
  COLLOGUE_DEVICE void wait(Missing missing, Late late, Sender sender, u32 stage, u32 token) {
    u64 started_ns = 0;
    bool waiting = true;
    while (waiting && !stopped) {
      for (u32 polls = 0; waiting && polls < kPollsBetweenLooks; polls++) waiting = any_in_warp(missing());
      if (waiting) {
        // The wait has become long: has a peer stopped the call, is the time over, was a peer called with something else?
        const u64 now = time_ns();
        if (started_ns == 0) started_ns = now;
        // Whoever waits for what others relay gives up a little later than those who know whom they miss.
        const u64 most = stage == kStagePartials ? p.timeout_ns : p.timeout_ns + (p.timeout_ns / 8 < kMostRelayNs ? p.timeout_ns / 8 : kMostRelayNs);
        const bool over = any_in_warp(now - started_ns > most);
        stopped = load_peer_written_together(own).w[2];
        if (!stopped && any_in_warp(now - started_ns > kLongWaitNs)) compare_headers(call, look_at_headers(call));
        if (!stopped && over) {
          stopped = kFoundHere;
          u32 rank = kNobody;
#pragma unroll
          for (int b = 0; b < kCount; b++)
            if (late(b)) rank = sender(b);
          if (rank != kNobody) found(kTimeout, rank, call, stage, token);
        }
      }
    }
  }

  static COLLOGUE_DEVICE bool is_missing(const Vector& v) {
    bool missing = false;
#pragma unroll
    for (int i = 0; i < D::kParts; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) missing |= v.part[i].w[j] == D::kSentinel;
    return missing;
  }
  static COLLOGUE_DEVICE Vector load_arrived(const u8* place) {
    Vector v;
#pragma unroll
    for (int i = 0; i < D::kParts; i++) v.part[i] = load_peer_written(place + 16 * i);
    return v;
  }

  // Adds every rank's term of one vector in rank order; `mine` is this rank's, disguised. All lanes of the warp together.
  COLLOGUE_DEVICE void receive_and_add(const Vector& mine, u32 offset, bool active, u32 token, float (&sum)[8]) {
    // As many terms at a time as registers hold: all of them where a thread has one 16-bit vector.
    constexpr int kMost = (C::kVectors == 1 && !C::kLoop ? 8 : 4) / D::kParts;
    constexpr int kBatch = C::kWorld < kMost ? C::kWorld : kMost;
#pragma unroll
    for (int first = 0; first < C::kWorld; first += kBatch) {
      Vector term[kBatch];
      wait<kBatch>(
          [&] {
            bool missing = false;
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
              const u32 k = first + b;
              term[b] = mine;
              if (k < C::kWorld && k != p.rank && active) term[b] = load_arrived(arrivals(k) + offset);
              missing |= is_missing(term[b]);
            }
            return missing;
          },
          [&](int b) { return is_missing(term[b]); }, [&](int b) { return static_cast<u32>(first + b); }, kStagePartials, token);
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (first + b == 0)
          begin<D>(sum, term[b]);
        else if (first + b < C::kWorld)
          add<D>(sum, term[b]);
      }
    }
  }
  // After receive_and_add: the places of the terms become clean again.
  COLLOGUE_DEVICE void wipe_terms(u32 offset, bool active) const {
    if (stopped || !active) return;
#pragma unroll
    for (int k = 0; k < C::kWorld; k++)
      if (k != p.rank) wipe_vector(arrivals(k) + offset);
  }

  // Until every rank has started this call. One warp of the grid.
  COLLOGUE_DEVICE void wait_for_headers() {
    const u32 lane = thread_index() % 32;
    const u32* const number = reinterpret_cast<const u32*>(header_of(call, lane));
    const auto missing = [&] { return lane < C::kWorld && static_cast<int>(load_peer_written_word(number) - (call + 1)) < 0; };
    wait<1>(missing, [&](int) { return missing(); }, [&](int) { return lane; }, kStageStart, 0);
  }

  // ---- failing

  // This thread has found a fault: fill the failure record, once per communicator, and tell every rank to stop.
  COLLOGUE_DEVICE void found(u32 fault, u32 rank, u32 of_call, u32 stage, u32 token) const {
    if (!claim(&control()->claimed)) return;
    write_record(fault, p.rank, rank, of_call, stage, token);
#pragma unroll 1
    for (u32 k = 0; k < C::kWorld; k++) store_word_to_peer(&reinterpret_cast<Control*>(p.workspace[k])->stop, fault << 8 | (p.rank + 1));
  }
  // At the end of a kernel that stopped: whatever stopped it, this rank has a record.
  COLLOGUE_DEVICE void report() const {
    if (stopped & kFoundHere || thread_index() % 32 != 0 || !claim(&control()->claimed)) return;
    write_record(stopped >> 8, (stopped & 0xffu) - 1, C::kWorld, call, 0, 0);
  }
  COLLOGUE_DEVICE void write_record(u32 fault, u32 finder, u32 rank, u32 of_call, u32 stage, u32 token) const {
    Failure* const f = p.failure;
    f->rank = finder;
    f->late_rank = rank;
    f->call = of_call;
    f->token = token;
    f->stage = stage;
    f->waited_ms = static_cast<u32>(p.timeout_ns / 1000000u);
    fence_system();
    store_word_to_peer(&f->fault, fault);
  }
};

}  // namespace collogue
