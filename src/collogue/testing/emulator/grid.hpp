// What a GPU runs: kernels of CTAs of warps of threads. State only; machine.hpp moves it.
#pragma once
#include <memory>
#include <vector>

#include "fibre.hpp"

namespace collogue::emulator {

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Cta;
struct Fibre;

// Who waits for something: woken together, each looks again.
using Waiters = std::vector<Fibre*>;

struct Fibre {
  Context context;
  char* stack = nullptr;
  Cta* cta = nullptr;
  u32 thread = 0;
  bool ready = false, ended = false;
  u64 cluster_phase = 0;   // in which this thread arrived
  u64 last_due = 0;        // of its stores
  u64 stores_not_before = 0;  // since its last fence
};

enum class Collective { kAny, kExchange, kSync, kLoad, kTime };

// What lanes meet for. `answer` lasts until all have met again, so every lane has time to read it.
struct Warp {
  Collective collective = Collective::kSync;
  u32 detail = 0;
  u32 arrived = 0;
  u32 value[32];
  alignas(16) u32 answer[32];
};

struct Cluster {
  u32 threads = 0, arrived = 0;
  u64 phase = 0;
  Waiters waiters;
  std::vector<Cta*> ctas;
};

struct Range {
  u64 first, end;
  bool holds(u64 at, u32 bytes) const { return at >= first && at + bytes <= end; }
};

struct Kernel;

struct Cta {
  Kernel* kernel = nullptr;
  Cluster* cluster = nullptr;
  u32 x = 0, y = 0;
  std::vector<Fibre> fibres;
  std::vector<Fibre*> ready;
  std::vector<Warp> warps;
  std::unique_ptr<u8[]> shared;
  std::size_t shared_bytes = 0;
  u32 at_block_barrier = 0;
  Waiters block_waiters, barrier_waiters;
  u32 running = 0;             // threads that have not ended
  bool slow = false;           // runs only when the rest of its rank cannot
  bool launched_next = false;
};

// One launch. It has ended when its threads have ended and all they stored has arrived.
struct Kernel {
  u32 entry = 0, rank = 0;
  u32 place = 0;  // in its rank's stream
  const void* params = nullptr;
  Range may_send{}, may_clean{};  // offsets in a workspace: of every rank, of its own
  u32 threads = 0, cluster_size = 0, rows = 0;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<u32> unstarted;  // rows
  u32 ctas_running = 0, launched_next = 0;
  u64 stores_in_flight = 0, words_sent = 0;
  bool started = false, ended = false;
  Waiters waiters;  // in the next kernel of this rank
};

// In the eight bytes of an mbarrier. Uninitialised shared memory does not hold the mark.
struct Mbarrier {
  static constexpr u8 kMark = 0xb7;
  int expected_bytes;
  unsigned short phase;
  u8 pending, mark;
};
static_assert(sizeof(Mbarrier) == 8);

}  // namespace collogue::emulator
