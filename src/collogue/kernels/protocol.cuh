// Ranks: generations, slots, sentinels, headers, bounded waits, failures. Moves packed words and knows no arithmetic.
//
// Whoever sends something to a rank writes it into that rank's workspace, in places that follow from the call's arguments. A word
// that still holds the sentinel has not arrived. Every word that is sent is awaited by one thread in the same call. There are
// several generations of memory, used in turn. One-shot has four: the next call puts the sentinels back while it waits anyway. The
// other kernels have two, and the thread that awaited a word puts the sentinel back. No rank can finish call c + 1 before
// every other rank has started it, and so has ended call c: nobody writes a generation that is still being read or cleaned.
#pragma once
#include "params.cuh"
#include "values.cuh"

namespace collogue {

constexpr u32 kGenerations = 2, kOneShotGenerations = 4;
constexpr u32 kMarksOffset = 256;        // of the marks of the last calls in the workspace: [call % kMarks][rank]
constexpr u32 kMarks = 4;
constexpr u32 kNotesOffset = 512;        // of what ranks that stopped the group had found: [rank]
constexpr u32 kBoundsOffset = 1024;      // of who owned which rows in the last calls, where rows were uneven: [call % kBounds][rank]
constexpr u32 kBounds = 32;
constexpr u32 kJournalOffset = 2048;     // of this rank's last calls: [call % kJournal]
constexpr u32 kJournal = 64;
constexpr u32 kDataOffset = 4096;        // of what one-shot uses; the other kernels' memory lies behind
constexpr u32 kLeftUnit = 512;           // bytes
constexpr u32 kPollsBetweenLooks = 256;  // at the clock and the stop word
constexpr u32 kLongWait = 96;            // in units of 2^20 ns: a wait longer than this compares marks
constexpr u32 kNobody = ~0u;

// In the first bytes of every workspace.
struct Control {
  u64 counter;  // calls in the high half, warps of the current call that have read these words in the low half
  u32 stop;     // Fault << 8 | 1 + rank of whoever found it, written on every rank: kernels end without sending or waiting
  u32 left;     // a half for each call % 2: units of its generation that a one-shot call left to be cleaned, with a parity bit
  u32 claimed;  // 1 + the call that fills the failure record; never 0 then
};

enum Fault : u32 { kNoFault = 0, kTimeout = 1, kMismatch = 2 };
constexpr u32 kFoundHere = 0x10000;  // in Ranks::stopped: a Fault << 8 that this warp has found, not another rank's stop word

// What a rank was called with, as its journal keeps it (collogue/gpu/header.py reads it).
struct Entry {
  u32 number;  // 1 + call
  u32 tokens, hidden, first;
  u32 options[2];  // Params::header
  float eps, weight_offset;
};
// The same in eight bytes, which arrive together: number and hash, on every rank.
struct Mark {
  u32 number, hash;
};

// What a rank has found, on every rank before its stop word: eight bytes that arrive together.
struct Note {
  u32 call, what;  // what: 1 + Ranks::late
};

// In pinned host memory, one per communicator; written by the first thread of a rank that has something to say.
struct Failure {
  u32 fault;      // 0: nothing; see Fault
  u32 rank;       // who found it
  u32 late_rank;  // whom rank waited for, or whose arguments differ
  u32 call;
  u32 token;
  u32 stage;
};

// What a wait is for.
enum Stage : u32 { kStagePartials = 0, kStageRows = 1, kStageStart = 2, kStagePrevious = 3, kStageShard = 4 };

template <class C>
struct Ranks {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  static constexpr int kPeers = C::kWorld - 1;

  const Params& p;
  u8* own;               // this rank's workspace
  u8* slot[C::kOneShot ? C::kWorld : 1];  // one-shot: target(k) of generation 0, worked out before it is needed
  Words head;            // the control words, as read
  u32 call;
  u32 stopped;           // do not send, do not wait; report() says why
  u32 generation;        // byte offset of this call's generation from the first
  u32 sent_at;           // in cycles; one-shot
  u32 late;              // what this thread has found: token << 8 | stage << 4 | rank

  // Needs no result of the previous kernel.
  COLLOGUE_DEVICE explicit Ranks(const Params& params)
      : p(params), own(params.workspace[params.rank]), call(0), stopped(0), generation(0), sent_at(0), late(kNobody) {
    if constexpr (C::kOneShot) {
#pragma unroll
      for (int k = 1; k < C::kWorld; k++) slot[k] = target(k);
    }
  }
  COLLOGUE_DEVICE Control* control() const { return reinterpret_cast<Control*>(own); }
  COLLOGUE_DEVICE u32 next_peer(u32 k) const { return p.rank + k < C::kWorld ? p.rank + k : p.rank + k - C::kWorld; }
  // Slots lie one behind the other in order of their senders; nobody has one for itself.
  static COLLOGUE_DEVICE u32 position(u32 sender, u32 receiver) { return C::kWorld == 2 ? 0 : sender < receiver ? sender : sender - 1; }
  // Row `of` of those that `rank` owns. Where it owns fewer, owns() says no.
  COLLOGUE_DEVICE u32 row_of(u32 rank, u32 of) const { return (C::kUneven ? p.bounds[rank] : rank * p.block) + of; }
  COLLOGUE_DEVICE bool owns(u32 rank, u32 t) const { return t < (C::kUneven ? p.bounds[rank + 1] : p.tokens); }
  // Where what this rank sends its k-th next peer goes, in the current generation.
  COLLOGUE_DEVICE u8* target(u32 k) const {
    return p.workspace[next_peer(k)] + p.data_offset + generation + position(p.rank, next_peer(k)) * p.slot_bytes;
  }
  // Where what the others send in this call arrives: slots[position(sender, rank)].
  COLLOGUE_DEVICE u8* slots() const { return own + p.data_offset + generation; }
  COLLOGUE_DEVICE u8* arrivals(u32 sender) const { return slots() + position(sender, p.rank) * p.slot_bytes; }

  // For compute_now(): what this is made of is used as soon as the previous kernel has ended.
  COLLOGUE_DEVICE u32 digest() const {
    static_assert(C::kOneShot);
    u32 digest = folded(own) ^ p.generation_bytes ^ p.slot_bytes;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) digest ^= folded(slot[k]);
    return digest;
  }
  // After wait_for_previous_kernel(); begin_call() uses what this asks for.
  COLLOGUE_DEVICE void ask() { head = load_peer_written_together(own); }
  COLLOGUE_DEVICE void begin_call() {
    call = head.w[1];
    compute_now(call);
    stopped = head.w[2];
    generation = call % (C::kOneShot ? kOneShotGenerations : kGenerations) * p.generation_bytes;
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
  COLLOGUE_DEVICE void send(const Vector& v, u32 offset, bool active) const {
    u8* place[C::kWorld];
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) {
      place[k] = slot[k] + (generation + offset);
      compute_now(place[k]);  // before it is known whether it is used
    }
    if (!active || stopped || offset >= p.slot_bytes) return;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) send_vector(place[k], v);
  }
  // The place becomes clean again.
  static COLLOGUE_DEVICE void wipe_vector(u8* place) {
#pragma unroll
    for (int i = 0; i < D::kParts; i++) store(place + 16 * i, Words{{D::kSentinel, D::kSentinel, D::kSentinel, D::kSentinel}});
  }

  // ---- the call's number and arguments

  // This warp has read the control words and will not again; the last of the grid advances the call number. Thread 0 of the grid
  // writes the journal and marks the call on every rank. One-shot leaves `left` bytes for the next call to clean.
  COLLOGUE_DEVICE void announce(u32 thread, u32 warps, u32 left = 0) const {
    if (thread % 32) return;
    count(&control()->counter, thread == 0 ? (1ull << 32) - (warps - 1) : 1ull);
    if (thread != 0) return;
    const u32 units = (left + kLeftUnit - 1) / kLeftUnit;
    const u32 half = units | ones(units) % 2 << 15;
    store_word_aside(&control()->left, call % 2 ? (head.w[3] & 0xffffu) | half << 16 : (head.w[3] & 0xffff0000u) | half);
    if (stopped) return;
    const Words entry[2] = {{{call + 1, p.tokens, p.hidden, p.first}}, {{p.header[0], p.header[1], bits(p.eps), bits(p.weight_offset)}}};
    u32 hash = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) hash = (hash ^ entry[i / 4].w[i % 4]) * 0x9e3779b1u;
    if constexpr (C::kBranch) {
      hash = (hash ^ bits(p.branch_eps)) * 0x9e3779b1u;
      hash = (hash ^ bits(p.branch_offset)) * 0x9e3779b1u;
    }
    if constexpr (C::kUneven) {
      Words ends[kMaxWorld / 4];
#pragma unroll
      for (int r = 0; r < kMaxWorld; r++) {
        ends[r / 4].w[r % 4] = p.bounds[r + 1];
        hash = (hash ^ p.bounds[r + 1]) * 0x9e3779b1u;
      }
      u8* const kept = own + kBoundsOffset + call % kBounds * sizeof(ends);
      store(kept, ends[0]);
      store(kept + 16, ends[1]);
    }
    const u32 place = mark_offset(call, p.rank);
#pragma unroll
    for (int k = 0; k < C::kWorld; k++) store_pair_together_to_peer(p.workspace[k] + place, Pair{{call + 1, hash}});
    u8* const journal = own + kJournalOffset + call % kJournal * sizeof(Entry);
    store(journal, entry[0]);
    store(journal + 16, entry[1]);
  }
  // What the call before has left; everything where a bit of that has been turned over. All threads of the grid together, while they
  // would wait anyway.
  COLLOGUE_DEVICE void clean(u32 thread, u32 threads) const {
    const u32 left = call % 2 ? head.w[3] & 0xffffu : head.w[3] >> 16;
    const u32 units = (left & 0x7fffu) | ones(left) % 2 << 15, bytes = smaller(units * kLeftUnit, p.one_shot_bytes);
    u8* const first = own + kDataOffset + (call - 1) % kOneShotGenerations * p.one_shot_bytes;
#pragma unroll 1
    for (u32 at = thread * 16; at < bytes; at += threads * 16) store(first + at, Words{{D::kSentinel, D::kSentinel, D::kSentinel, D::kSentinel}});
  }
  static COLLOGUE_DEVICE u32 mark_offset(u32 of_call, u32 rank) { return kMarksOffset + (of_call % kMarks * kMaxWorld + rank) * sizeof(Mark); }
  // The marks of call `of_call`: lane r reads rank r's.
  COLLOGUE_DEVICE Pair look_at_marks(u32 of_call) const {
    const u32 lane = thread_index() % 32;
    return lane < C::kWorld ? load_pair_written_together(own + mark_offset(of_call, lane)) : Pair{{0, 0}};
  }
  // Whether another rank's arguments differ from this one's. A mark that has not come, this rank's too, says nothing. All lanes.
  COLLOGUE_DEVICE void compare_marks(u32 of_call, const Pair& seen, u32 stage) {
    const u32 marked = of_lane(seen.w[0], p.rank), mine = of_lane(seen.w[1], p.rank);
    const bool differs = marked == of_call + 1 && seen.w[0] == of_call + 1 && seen.w[1] != mine;
    if (!any_in_warp(differs)) return;
    if (differs) late = stage << 4 | (thread_index() % 32);
    stop(kMismatch);
  }
  // Of what was seen after this call's sends: the call before. The first warp of the grid, where it would wait anyway.
  COLLOGUE_DEVICE void compare_previous_call(const Pair& seen) {
    if (call != 0 && !stopped) compare_marks(call - 1, seen, kStagePrevious);
  }

  // ---- waiting

  // Until `missing()` is false in every lane of the warp, or the call is stopped. `missing_rank()`: whom this lane waits for, or
  // kNobody. All lanes together.
  template <class Missing, class MissingRank>
  COLLOGUE_DEVICE void wait(Missing missing, MissingRank missing_rank, u32 stage, u32 token) {
    u32 started = 0, look = stopped;  // not a constant: looking around stands in front of the polls, not between them and what follows
    for (;;) {
      if (look) {
        if (!stopped) look_around(missing_rank, started, stage, token);
        if (stopped) return;
      }
      // Polling lines that are being written slows their arrival: leave the wire alone until the words can be here.
      if constexpr (C::kFirstPoll != 0)
        while (clock_cycles() - sent_at < C::kFirstPoll) {
        }
      bool waiting = true;
      for (u32 polls = 0; waiting && polls < kPollsBetweenLooks; polls++) waiting = any_in_warp(missing());
      if (!waiting) return;
      look = 1;
    }
  }
  // The wait has become long: has a peer stopped the call, is the time over, was a peer called with something else?
  template <class MissingRank>
  COLLOGUE_DEVICE void look_around(MissingRank missing_rank, u32& started, u32 stage, u32 token) {
    const u32 now = static_cast<u32>(time_ns() >> 20);
    if (started == 0) started = now;
    stopped = of_lane(load_peer_written_word(&control()->stop), 0);  // one for all lanes, whatever the assembler makes of the load
    if (!stopped && any_in_warp(now - started > kLongWait)) compare_marks(call, look_at_marks(call), stage);
    // Whoever waits for what others relay gives up a little later than those who know whom they miss.
    if (stopped || !any_in_warp(now - started > (stage == kStageRows ? p.relay_timeout : p.timeout))) return;
    const u32 rank = missing_rank();
    if (rank != kNobody) late = token << 8 | stage << 4 | rank;
    if (any_in_warp(rank != kNobody)) stop(kTimeout);  // else it has come after all
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

  // Adds every rank's term of one vector in rank order; `mine` is this rank's, disguised; `place`: of the vector in slots(). All lanes
  // of the warp together.
  COLLOGUE_DEVICE void receive_and_add(const Vector& mine, const u8* place, bool active, u32 token, float (&sum)[8]) {
    if constexpr (C::kWorld == 2) {
      Vector term{};
      wait(
          [&] {
            if (active) term = load_arrived(place);
            return is_missing(term);
          },
          [&] { return is_missing(term) ? 1 - p.rank : kNobody; }, kStagePartials, token);
      begin<D>(sum, mine);
      add<D>(sum, term);  // the order of two terms changes no bit
      return;
    }
    // As many terms at a time as registers hold: all of them where a thread has one 16-bit vector.
    constexpr int kMost = (C::kVectors == 1 && !C::kLoop ? 8 : 4) / D::kParts;
    constexpr int kBatch = C::kWorld < kMost ? C::kWorld : kMost;
#pragma unroll
    for (int first = 0; first < C::kWorld; first += kBatch) {
      Vector term[kBatch];
      wait(
          [&] {
            bool missing = false;
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
              const u32 k = first + b;
              term[b] = mine;
              if (k < C::kWorld && k != p.rank && active) term[b] = load_arrived(place + position(k, p.rank) * p.slot_bytes);
              missing |= is_missing(term[b]);
            }
            return missing;
          },
          [&] {
            u32 rank = kNobody;
#pragma unroll
            for (int b = 0; b < kBatch; b++)
              if (is_missing(term[b])) rank = first + b;
            return rank;
          },
          kStagePartials, token);
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
    for (int k = 1; k < C::kWorld; k++) wipe_vector(arrivals(next_peer(k)) + offset);
  }

  // Until every rank has started this call. One warp of the grid.
  COLLOGUE_DEVICE void wait_for_marks() {
    const u32 lane = thread_index() % 32;
    const auto missing = [&] { return lane < C::kWorld && static_cast<int>(look_at_marks(call).w[0] - (call + 1)) < 0; };
    wait(missing, [&] { return missing() ? lane : kNobody; }, kStageStart, 0);
  }

  // ---- failing

  // This warp has found a fault. Where warps wait more than once, they must not do so for a whole timeout each. The other ranks hear of
  // it at the end of the kernel, by report(): what stands in every wait is in the way of every call.
  COLLOGUE_DEVICE void stop(u32 fault) {
    stopped = kFoundHere | fault << 8;
    if constexpr (C::kLoop) tell(p.rank, fault);
  }
  COLLOGUE_DEVICE u32 call_of_fault() const { return (late >> 4 & 0xfu) == kStagePrevious ? call - 1 : call; }
  // What this lane has found, if it has, and then the stop word, to rank k.
  COLLOGUE_DEVICE void tell(u32 k, u32 fault) const {
    if (late == kNobody) return;
    store_pair_together_to_peer(p.workspace[k] + kNotesOffset + p.rank * sizeof(Note), Pair{{call_of_fault(), 1 + late}});
    fence_system();
    store_word_to_peer(&reinterpret_cast<Control*>(p.workspace[k])->stop, fault << 8 | (p.rank + 1));
  }
  // At the end of a kernel that stopped. Who found the fault leaves on every rank what it has found, and tells it to stop. Once per
  // communicator somebody fills the failure record.
  COLLOGUE_DEVICE void report() const {
    const bool here = any_in_warp(late != kNobody);  // not by what a stop word holds: it may have been written over
    const u32 fault = stopped >> 8 & 0xffu, finder = here ? p.rank : (stopped & 0xffu) - 1;
    if (here ? late == kNobody : thread_index() % 32 != 0 || (fault && finder == p.rank)) return;  // the finder has more to say
#pragma unroll 1
    for (u32 k = 0; k < C::kWorld; k++) tell(k, fault);
    Failure* const f = p.failure;
    if (load_peer_written_word(&f->fault)) return;
    // Another kernel may be filling it now; what no kernel of these calls can have written keeps nobody away.
    const u32 taken = claim(&control()->claimed, call + 1 ? call + 1 : 1);
    if (taken && taken - call <= 2) return;
    f->rank = finder;
    f->late_rank = here ? late & 0xfu : C::kWorld;
    f->call = here ? call_of_fault() : call;
    f->token = here ? late >> 8 : 0;
    f->stage = here ? late >> 4 & 0xfu : 0;
    fence_system();
    store_word_to_peer(&f->fault, fault);
  }
};

}  // namespace collogue
