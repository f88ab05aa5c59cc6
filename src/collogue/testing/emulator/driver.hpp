// What Python calls: included after the generated kernel, whose name is COLLOGUE_KERNEL.
#pragma once

// Mirrored by collogue/testing/emulator/run.py.
struct Job {
  unsigned ranks, calls, cluster, threads, mode, victim, absent_call, bytes;
  unsigned long long seed, workspace_bytes, failure_bytes;
  const collogue::Params* params;  // [calls][ranks]
  const unsigned* rows;            // [calls] clusters of the grid
  unsigned long long* sent;        // [calls][ranks] 32-bit words stored to peers' slots
  unsigned long long ticks;
  char error[256];
};

extern "C" void collogue_emulate(Job* job) {
  using namespace collogue::emulator;
  if (job->bytes != sizeof(Job)) return;  // Python sees that nothing was done
  Machine machine;
  collogue::emulator::machine = &machine;
  machine.random.state = job->seed;
  machine.mode = static_cast<Mode>(job->mode);
  machine.victim = job->victim;
  machine.absent_call = job->absent_call;
  machine.entry = [](const void* params) { COLLOGUE_KERNEL(*static_cast<const collogue::Params*>(params)); };
  machine.ranks.resize(job->ranks);
  std::vector<std::unique_ptr<Kernel>> kernels;
  for (u32 call = 0; call < job->calls; call++)
    for (u32 rank = 0; rank < job->ranks; rank++) {
      auto kernel = std::make_unique<Kernel>();
      kernel->rank = rank;
      kernel->call = call;
      kernel->params = &job->params[call * job->ranks + rank];
      kernel->threads = job->threads;
      kernel->cluster_size = job->cluster;
      kernel->rows = job->rows[call];
      machine.ranks[rank].stream.push_back(kernel.get());
      kernels.push_back(std::move(kernel));
    }
  for (u32 rank = 0; rank < job->ranks; rank++) {
    u8* const workspace = job->params[rank].workspace[rank];
    u8* const failure = reinterpret_cast<u8*>(job->params[rank].failure);
    machine.peer_memory.push_back({workspace, workspace + job->workspace_bytes});
    machine.peer_memory.push_back({failure, failure + job->failure_bytes});
  }
  machine.run();
  for (std::size_t i = 0; i < kernels.size(); i++) job->sent[i] = kernels[i]->words_sent;
  job->ticks = machine.tick;
  std::memcpy(job->error, machine.error, sizeof job->error);
  collogue::emulator::machine = nullptr;
}
