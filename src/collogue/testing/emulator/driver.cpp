// What Python calls. Linked with the generated kernels.
#include "protocol.cuh"

// By the numbers that launches name.
extern void (*collogue_kernels[])(collogue::Params);
// Of the kernels' protocol, which may be a twin's.
extern const unsigned collogue_generations, collogue_one_shot_generations;

// Mirrored by collogue/testing/emulator/run.py.
struct Launch {
  const collogue::Params* params;
  unsigned long long sent;  // 32-bit words stored to peers' slots
  unsigned kernel, rank, number, cluster, rows, threads;  // number: of calls that the device has counted before
};
struct Job {
  unsigned ranks, launches, mode, victim, absent_launch, bytes, gpus, ctas, in_order, skew;
  unsigned long long seed, workspace_bytes, failures, failure_bytes, ticks, outputs;
  const collogue::emulator::Range* output;  // in order
  Launch* launch;  // of every rank in the order of its stream
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
  machine.absent_launch = job->absent_launch;
  machine.entry = [](u32 kernel, const void* params) { collogue_kernels[kernel](*static_cast<const collogue::Params*>(params)); };
  machine.ranks.resize(job->ranks);
  machine.free_ctas.assign(job->gpus, job->ctas);
  machine.in_order = job->in_order;
  machine.control_bytes = collogue::kDataOffset;
  for (u32 rank = 0; rank < job->ranks; rank++) {
    u64 workspace = 0;  // as the rank's own launches name it
    for (u32 i = 0; i < job->launches && !workspace; i++) {
      const collogue::Params& params = *job->launch[i].params;
      if (job->launch[i].rank == rank) workspace = reinterpret_cast<u64>(params.workspace[params.rank]);
    }
    machine.ranks[rank].gpu = rank % job->gpus;
    machine.ranks[rank].not_before = job->skew ? machine.random.below(job->skew) : 0;
    machine.workspaces.push_back({workspace, workspace + job->workspace_bytes});
    machine.failures.push_back({job->failures + rank * job->failure_bytes, job->failures + (rank + 1) * job->failure_bytes});
  }
  machine.outputs.assign(job->output, job->output + job->outputs);
  std::vector<std::unique_ptr<Kernel>> kernels;
  for (u32 i = 0; i < job->launches; i++) {
    const Launch& launch = job->launch[i];
    const collogue::Params& params = *launch.params;
    auto kernel = std::make_unique<Kernel>();
    kernel->entry = launch.kernel;
    kernel->rank = launch.rank;
    kernel->place = static_cast<u32>(machine.ranks[launch.rank].stream.size());
    kernel->params = &params;
    kernel->threads = launch.threads;
    kernel->cluster_size = launch.cluster;
    kernel->rows = launch.rows;
    // The generation of this call on every rank, and the one that the call before has left to be cleaned on this one.
    const u32 generations = params.data_offset == collogue::kDataOffset ? collogue_one_shot_generations : collogue_generations;
    const u64 send = params.data_offset + launch.number % generations * params.generation_bytes;
    const u64 clean = collogue::kDataOffset + (launch.number - 1) % collogue_one_shot_generations * params.one_shot_bytes;
    kernel->may_send = {send, send + params.generation_bytes};
    kernel->may_clean = {clean, clean + params.one_shot_bytes};
    machine.ranks[launch.rank].stream.push_back(kernel.get());
    kernels.push_back(std::move(kernel));
  }
  machine.run();
  for (u32 i = 0; i < job->launches; i++) job->launch[i].sent = kernels[i]->words_sent;
  job->ticks = machine.tick;
  std::memcpy(job->error, machine.error, sizeof job->error);
  collogue::emulator::machine = nullptr;
}
