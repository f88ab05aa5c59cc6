// Runs the kernels of all ranks in one thread of the host. A seeded adversary chooses at every scheduling point who goes on, and
// when each stored word arrives.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <queue>

#include "grid.hpp"

namespace collogue::emulator {

constexpr u64 kNanosecondsPerTick = 1000;
constexpr u64 kLongestRun = 1ull << 28;  // ticks

// How the adversary treats the victim (named alike in collogue/testing/emulator/run.py).
enum Mode : u32 {
  kFair,      // all alike
  kLate,      // the victim stands still most of the time
  kAhead,     // the victim runs whenever it can
  kSlowCtas,  // some CTAs of every rank, and a warp of others, stand still, chosen anew now and then
  kAbsent,    // the victim does not launch one of its kernels until all others have ended
};

struct Random {
  u64 state;
  u64 next() {  // splitmix64
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  u64 below(u64 n) { return next() % n; }
  u64 magnitude(u32 most) { return below(1ull << (1 + below(most))); }  // below 2^most, small ones more often
};

// A word on its way: to global memory, or to a CTA's shared memory and barrier.
struct Flight {
  u64 due, number;
  u8* address;
  u32 word;
  Kernel* kernel;
  Cta* cta;
  u32 barrier;  // offset in the CTA's shared memory
  bool two;     // a second word arrives with the first
  u32 second;
  bool operator>(const Flight& other) const { return due != other.due ? due > other.due : number > other.number; }
};

struct Rank {
  std::vector<Kernel*> stream;
  u32 front = 0;  // first kernel that has not ended
  u32 weight = 1;
  u32 gpu = 0;           // streams of one GPU share its room for CTAs
  u64 not_before = 0;    // tick at which the first kernel is launched: what other kernels delay this stream by
};

class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  ~Machine() {
    for (char* stack : stacks_) std::free(stack);
  }

  Random random{0};
  Mode mode = kFair;
  u32 victim = 0, absent_launch = ~0u;
  u64 tick = 0;
  void (*entry)(u32, const void*) = nullptr;  // a kernel by its number
  std::vector<Rank> ranks;
  std::vector<u32> free_ctas;  // by GPU
  bool in_order = false;       // clusters start in the order of their numbers, as GPUs are seen to do
  std::vector<Range> workspaces, failures;  // addresses, by rank
  std::vector<Range> outputs;               // addresses, in order
  u64 control_bytes = 0;                    // at the start of every workspace
  char error[256] = "";
  Fibre* current = nullptr;

  // Until every kernel has ended, or something is wrong.
  void run() {
    while (!error[0] && !all_ended()) {
      if (tick > kLongestRun) return fail("the kernels do not end");
      if (tick >= weather_until_) change_weather();
      deliver();
      start_kernels();
      if (step() || error[0]) continue;
      if (!flights_.empty())
        tick = std::max(tick, flights_.top().due);
      else if (!all_ended()) {
        u64 next = ~0ull;
        for (const Rank& rank : ranks)
          if (rank.not_before > tick) next = std::min(next, rank.not_before);
        if (next == ~0ull)
          fail("deadlock: no thread can go on");
        else
          tick = next;
      }
    }
  }

  // ---- called by fibres

  // Others may run here.
  void point() {
    tick++;
    if (burst_ == 0) return leave();
    burst_--;
  }
  // Until someone makes it ready.
  void block(Fibre& fibre) {
    fibre.ready = false;
    leave();
  }
  void block_on(Waiters& waiters) {
    waiters.push_back(current);
    block(*current);
  }
  void make_ready(Fibre& fibre) {
    if (fibre.ready) return;
    fibre.ready = true;
    fibre.cta->ready.push_back(&fibre);
  }
  void wake(Waiters& waiters) {
    for (Fibre* fibre : waiters) make_ready(*fibre);
    waiters.clear();
  }
  void fail(const char* format, ...) {
    if (error[0]) return;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
    if (current) leave();  // for good
  }

  // Words of one store arrive one by one, in any order, but not before an earlier fence's stores.
  void store_later(void* address, u32 word) {
    u8* const first = static_cast<u8*>(address);
    if (!may_store(first, 4)) return fail("a store left the memory of its call");
    send({0, 0, first, word, current->cta->kernel, nullptr, 0, false, 0});
  }
  // Two words that arrive together.
  void store_pair_later(void* address, u32 low, u32 high) {
    u8* const first = static_cast<u8*>(address);
    if (!may_store(first, 8)) return fail("a store left the memory of its call");
    send({0, 0, first, low, current->cta->kernel, nullptr, 0, true, high});
  }
  void send_to_cta(Cta& cta, u32 offset, u32 word, u32 barrier) {
    if (!cta.shared) return fail("a word was sent to a CTA that has no barriers yet");
    if (offset + 4 > cta.shared_bytes || barrier + 8 > cta.shared_bytes) return fail("a word missed the other CTA's shared memory");
    send({0, 0, cta.shared.get() + offset, word, current->cta->kernel, &cta, barrier, false, 0});
  }
  // To an output of any rank.
  void store_now(void* address, const void* from, u32 bytes) {
    const u64 first = reinterpret_cast<u64>(address);
    const auto behind = std::upper_bound(outputs.begin(), outputs.end(), first, [](u64 at, const Range& range) { return at < range.first; });
    if (behind == outputs.begin() || !behind[-1].holds(first, bytes)) return fail("a store left the outputs");
    std::memcpy(address, from, bytes);
  }
  // Whether it lies where peers store.
  bool is_peer_memory(const void* address, u32 bytes) const {
    const auto holds = [&](const Range& range) { return range.holds(reinterpret_cast<u64>(address), bytes); };
    return std::any_of(workspaces.begin(), workspaces.end(), holds) || std::any_of(failures.begin(), failures.end(), holds);
  }
  // Whether the current kernel may store there: control words, its generation, what it has to clean, its rank's failure record.
  bool may_store(const void* address, u32 bytes) const {
    const Kernel& kernel = *current->cta->kernel;
    const u64 first = reinterpret_cast<u64>(address);
    for (u32 r = 0; r < workspaces.size(); r++) {
      if (!workspaces[r].holds(first, bytes)) continue;
      const u64 offset = first - workspaces[r].first;
      const bool may_clean = r == kernel.rank && kernel.may_clean.holds(offset, bytes);
      return offset + bytes <= control_bytes || kernel.may_send.holds(offset, bytes) || may_clean;
    }
    return failures[kernel.rank].holds(first, bytes);
  }
  void count_sent(u32 words) { current->cta->kernel->words_sent += words; }
  // A barrier: whoever fences after it fences what all of them stored before it.
  static void join_stores(Fibre* fibres, u32 count) {
    u64 last = 0;
    for (u32 i = 0; i < count; i++) last = std::max(last, fibres[i].last_due);
    for (u32 i = 0; i < count; i++) fibres[i].last_due = last;
  }
  void fence() { current->stores_not_before = current->last_due + 1; }

  // Arrives at a barrier with `bytes` still to come, or counts bytes that came.
  void change_barrier(Cta& cta, u8* address, int bytes, bool arrive) {
    Mbarrier barrier;
    std::memcpy(&barrier, address, sizeof barrier);
    if (barrier.mark != Mbarrier::kMark) return fail("a barrier was used before it was initialized");
    barrier.expected_bytes += bytes;
    if (arrive && barrier.pending-- == 0) return fail("a barrier was armed twice in one phase");
    if (barrier.pending == 0 && barrier.expected_bytes == 0) {
      barrier.phase++;
      barrier.pending = 1;
      wake(cta.barrier_waiters);
    }
    std::memcpy(address, &barrier, sizeof barrier);
  }

 private:
  Context scheduler_;
  u64 burst_ = 0, weather_until_ = 0, flight_number_ = 0;
  std::priority_queue<Flight, std::vector<Flight>, std::greater<Flight>> flights_;
  std::vector<char*> stacks_, free_stacks_;

  bool all_ended() const {
    return std::all_of(ranks.begin(), ranks.end(), [](const Rank& r) { return r.front == r.stream.size(); });
  }
  void leave() { Context::change(current->context, scheduler_); }

  // ---- words on their way

  void send(Flight flight) {
    flight.due = std::max(tick + random.magnitude(mode == kFair ? 8 : 13), current->stores_not_before);
    flight.number = flight_number_++;
    current->last_due = std::max(current->last_due, flight.due);
    flight.kernel->stores_in_flight++;
    flights_.push(flight);
  }
  void deliver() {
    while (!flights_.empty() && flights_.top().due <= tick && !error[0]) {
      const Flight flight = flights_.top();
      flights_.pop();
      if (flight.cta && flight.cta->running == 0) return fail("a word was sent to a CTA that has ended");
      if (flight.cta) receive(*flight.cta, flight.address);
      std::memcpy(flight.address, &flight.word, 4);
      if (flight.two) std::memcpy(flight.address + 4, &flight.second, 4);
      if (flight.cta) change_barrier(*flight.cta, flight.cta->shared.get() + flight.barrier, -4, false);
      flight.kernel->stores_in_flight--;
      end_if_done(*flight.kernel);
    }
  }
  // Nothing orders a CTA's own stores before the words that others send it, so it must have stored nothing there.
  void receive(Cta& cta, const u8* address) {
    const std::size_t word = static_cast<std::size_t>(address - cta.shared.get()) / 4;
    if (!cta.received[word] && std::any_of(address, address + 4, [](u8 byte) { return byte != kUntouched; }))
      return fail("a word was sent to where the CTA itself has stored");
    cta.received[word] = true;
  }

  // ---- kernels, CTAs, threads

  void start_kernels() {
    for (u32 r = 0; r < ranks.size(); r++) {
      Rank& rank = ranks[r];
      if (tick < rank.not_before) continue;
      for (u32 i = rank.front; i < rank.stream.size(); i++) {
        Kernel& kernel = *rank.stream[i];
        if (kernel.started) continue;
        const Kernel* const previous = i ? rank.stream[i - 1] : nullptr;
        const bool allowed = !previous || previous->ended || previous->launched_next == previous->rows * previous->cluster_size;
        if (!allowed || (mode == kAbsent && r == victim && i == absent_launch && !others_ended(r))) break;
        kernel.started = true;
        kernel.ctas_running = kernel.rows * kernel.cluster_size;
        for (u32 row = 0; row < kernel.rows; row++) kernel.unstarted.push_back(row);
        end_if_done(kernel);
      }
    }
  }
  bool others_ended(u32 r) const {
    for (u32 other = 0; other < ranks.size(); other++)
      if (other != r && ranks[other].front != ranks[other].stream.size()) return false;
    return true;
  }
  void start_cluster(Kernel& kernel) {
    auto& rows = kernel.unstarted;
    std::iter_swap(in_order ? std::min_element(rows.begin(), rows.end()) : rows.begin() + random.below(rows.size()), rows.end() - 1);
    free_ctas[ranks[kernel.rank].gpu] -= kernel.cluster_size;
    const u32 row = kernel.unstarted.back();
    kernel.unstarted.pop_back();
    auto cluster = std::make_unique<Cluster>();
    cluster->threads = kernel.cluster_size * kernel.threads;
    for (u32 x = 0; x < kernel.cluster_size; x++) {
      auto cta = std::make_unique<Cta>();
      cta->kernel = &kernel;
      cta->cluster = cluster.get();
      cta->x = x, cta->y = row;
      cta->running = kernel.threads;
      cta->slow = mode == kSlowCtas && random.below(3) == 0;
      cta->fibres.resize(kernel.threads);
      cta->warps.resize(kernel.threads / 32);
      for (u32 thread = 0; thread < kernel.threads; thread++) start_fibre(*cta, thread);
      cluster->ctas.push_back(cta.get());
      kernel.ctas.push_back(std::move(cta));
    }
    kernel.clusters.push_back(std::move(cluster));
  }
  void start_fibre(Cta& cta, u32 thread);
  void end_fibre(Fibre& fibre) {
    if (stack_mark(fibre.stack) != kStackMark) return fail("a fibre's stack ran over");
    free_stacks_.push_back(fibre.stack);
    Cta& cta = *fibre.cta;
    Kernel& kernel = *cta.kernel;
    if (--cta.running) return;
    free_ctas[ranks[kernel.rank].gpu]++;
    if (!cta.launched_next) kernel.launched_next++;
    kernel.ctas_running--;
    end_if_done(kernel);
  }
  void end_if_done(Kernel& kernel) {
    Rank& rank = ranks[kernel.rank];
    if (kernel.ctas_running || kernel.stores_in_flight || kernel.ended) return;
    if (rank.stream[rank.front] != &kernel) return fail("a kernel ended before the one before it");
    kernel.ended = true;
    rank.front++;
    wake(kernel.waiters);
    kernel.ctas.clear();
    kernel.clusters.clear();
  }

  // ---- the adversary

  // Lets one thread run for a while. False where none can.
  bool step() {
    Rank* const rank = pick_rank();
    if (!rank) return false;
    if (Kernel* const kernel = pick_unstarted(*rank)) {
      start_cluster(*kernel);
      return true;
    }
    Cta* const cta = pick_cta(*rank);
    if (!cta) return false;
    std::size_t i = random.below(cta->ready.size());
    for (u32 tries = 0; tries < 64 && cta->ready[i]->thread / 32 == cta->slow_warp; tries++) i = random.below(cta->ready.size());
    current = cta->ready[i];
    burst_ = random.magnitude(5);
    Context::change(scheduler_, current->context);
    Fibre& fibre = *current;
    current = nullptr;
    if (fibre.ready) return true;
    cta->ready[i] = cta->ready.back();
    cta->ready.pop_back();
    if (fibre.ended) end_fibre(fibre);
    return true;
  }
  bool has_room(const Rank& rank, const Kernel& kernel) const {
    return !kernel.unstarted.empty() && free_ctas[rank.gpu] >= kernel.cluster_size;
  }
  bool can_run(const Rank& rank) const {
    for (u32 i = rank.front; i < rank.stream.size() && rank.stream[i]->started; i++) {
      if (has_room(rank, *rank.stream[i])) return true;
      for (auto& cta : rank.stream[i]->ctas)
        if (!cta->ready.empty()) return true;
    }
    return false;
  }
  Rank* pick_rank() {
    std::vector<Rank*>& able = able_;
    able.clear();
    u64 total = 0;
    for (Rank& rank : ranks)
      if (can_run(rank)) able.push_back(&rank), total += rank.weight;
    if (able.empty()) return nullptr;
    if (total == 0) return able[random.below(able.size())];  // only those that should stand still
    u64 ticket = random.below(total);
    for (Rank* rank : able) {
      if (ticket < rank->weight) return rank;
      ticket -= rank->weight;
    }
    return able.back();
  }
  Kernel* pick_unstarted(Rank& rank) {
    bool any_ready = false;
    Kernel* found = nullptr;
    for (u32 i = rank.front; i < rank.stream.size() && rank.stream[i]->started; i++) {
      if (!found && has_room(rank, *rank.stream[i])) found = rank.stream[i];
      for (auto& cta : rank.stream[i]->ctas) any_ready |= !cta->ready.empty();
    }
    return found && (!any_ready || random.below(mode == kSlowCtas ? 200 : 4) == 0) ? found : nullptr;
  }
  Cta* pick_cta(Rank& rank) {
    ready_.clear();
    slow_.clear();
    for (u32 i = rank.front; i < rank.stream.size() && rank.stream[i]->started; i++)
      for (auto& cta : rank.stream[i]->ctas)
        if (!cta->ready.empty()) (cta->slow ? slow_ : ready_).push_back(cta.get());
    std::vector<Cta*>& from = ready_.empty() ? slow_ : ready_;
    return from.empty() ? nullptr : from[random.below(from.size())];
  }
  void change_weather() {
    weather_until_ = tick + random.magnitude(13);
    for (u32 r = 0; r < ranks.size(); r++) {
      Rank& rank = ranks[r];
      rank.weight = mode == kFair ? 1 : 1 << random.below(6);
      const bool harsh = random.below(4) != 0;
      if (mode == kLate && r == victim && harsh) rank.weight = 0;
      if (mode == kAhead && r != victim && harsh) rank.weight = 0;
      for (u32 i = rank.front; i < rank.stream.size() && rank.stream[i]->started; i++)
        for (auto& cta : rank.stream[i]->ctas) {
          cta->slow = mode == kSlowCtas && random.below(3) == 0;
          cta->slow_warp = mode == kSlowCtas ? random.below(2 * cta->warps.size()) : ~0u;  // half of the time none
        }
    }
  }
  std::vector<Rank*> able_;
  std::vector<Cta*> ready_, slow_;
  friend void fibre_main();
};

inline Machine* machine;

// The first function of every fibre.
inline void fibre_main() {
  Fibre& fibre = *machine->current;
  machine->entry(fibre.cta->kernel->entry, fibre.cta->kernel->params);
  fibre.ready = false;
  fibre.ended = true;
  machine->leave();
}

inline void Machine::start_fibre(Cta& cta, u32 thread) {
  Fibre& fibre = cta.fibres[thread];
  if (free_stacks_.empty()) free_stacks_.push_back(stacks_.emplace_back(new_stack()));
  fibre.stack = free_stacks_.back();
  free_stacks_.pop_back();
  fibre.cta = &cta;
  fibre.thread = thread;
  fibre.context.start(fibre.stack, fibre_main);
  make_ready(fibre);
}

}  // namespace collogue::emulator
