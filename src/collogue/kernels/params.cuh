// What the host tells a kernel (collogue/gpu/launch.py reads it here) and what a kernel is compiled for.
#pragma once
#include "types.cuh"

namespace collogue {

constexpr int kMaxWorld = 8, kMaxBounds = 9, kMaxTerms = 16;

struct Failure;

struct Params {
  const u8* partial;         // [T, H] this rank's term
  const u8* residual;        // [T, H], or the rows that this rank owns
  const u8* weight;          // [H]
  u8* stream;                // [T, H] y: the reduced tensor or the residual stream, or the rows of it that this rank owns
  u8* norm;                  // [T, H]; all_gather: values of any kind
  u8* codes;                 // [T, H] or [T, H / 2] bytes
  u8* scales;                // layout of the format
  const float* scale;        // NVFP4: multiplier g; FP8Static: divisor; null: scale_value. Read with the inputs
  const u8* shard_values;    // all_gather: the rows that this rank gives
  const u8* shard_codes;
  const u8* shard_scales;
  const u32* expert_index;   // [T, K] rows of `partial`, the experts' output [P, H]; past its end: none
  const u8* expert_weights;  // [T, K], or [E, T] where `partial` is [E, T, H]
  const u8* shared_expert;   // [T, H] added to the experts' rows
  const u8* branch_weight;   // [H] of the norm of the sum
  u8* workspace[kMaxWorld];  // every rank's symmetric buffer, mapped here
  Failure* failure;          // pinned host memory
  u32 timeout;               // of a wait, in units of 2^20 ns
  u32 relay_timeout;         // of a wait for what another rank relays
  u32 tokens;
  u32 hidden;                // H, a multiple of 8
  u32 rank;
  u32 one_shot_bytes;        // of a generation of one-shot
  u32 data_offset;           // of generation 0 of this kernel
  u32 generation_bytes;      // of this kernel
  u32 slot_bytes;            // what one rank may send another in one step of this call
  u32 gather_bytes;          // the same in the second step
  u32 first, count;          // rows that this launch does; of each owner, where rows have owners
  u32 block;                 // rows of one owner: rank r owns rows r * block, ...; not of kUneven
  u32 width;                 // two-shot: vectors of a row that one rank owns
  u32 wire_bytes;            // of one finished row on its way to the other ranks
  u32 scale_rows;            // of the scale tensor, whose padding this launch writes; 0: another launch does
  u32 column_stride;         // elements between columns of a column-major scale tensor
  u32 shard_column_stride;
  u32 experts;               // K or E
  u32 expert_rows;           // P
  float scaling;             // of the sum of a token's experts
  float branch_eps;
  float branch_offset;
  float eps;
  float weight_offset;
  float scale_value;
  float smallest;            // lower bound of dynamic FP8 scales
  u32 header[2];             // what the kernel cannot tell of itself (collogue/gpu/header.py)
  const u8* up;              // [T, H] what silu(partial) is multiplied by; rows of both lie row_stride elements apart
  u32 row_stride;
  u32 bounds[kMaxBounds];    // kUneven: rank r owns rows bounds[r] to bounds[r + 1] - 1; `tokens` behind the last
  const u8* terms[kMaxTerms];  // [T, H] each: what is added in their order (source.cuh)
  const u8* row_scales;      // [T] float32: of `partial`, a product in float32
  const u8* column_scales;   // [H] float32
  const u8* bias;            // [H]
};

// struct Config {                        generated per variant
//   using D, WeightD                     value dtype, weight dtype
//   kWorld                               ranks
//   kOneShot                             whether this is the one-shot kernel
//   kResidual, kStream, kNorm, kKeepNorm what is added, stored, done, stored
//   kBranch, BranchWeightD               whether the sum is normed before the residual is added, and by which weights
//   Format, Layout                       quantization (format.cuh) and where its scales lie (layouts.cuh)
//   Source<Config>                       where this rank's terms come from (source.cuh)
//   kThreads, kVectors, kClustered       a row is kVectors * 8 elements of each thread of a CTA, of each CTA of a cluster
//   kBlocks                              upper bound of ceil(H / 256), a multiple of 4
//   kLoop                                whether a CTA may do more than one row
//   kFirstPoll                           cycles between sending and the first poll
//   kAhead                               two-shot: turns between the sum of a row and its finish, 0 or 1; local: rows asked for ahead
//   kLateWeight                          whether the weight is read behind the wait for the previous kernel
//   kLaunchLate                          whether the next kernel is launched at the end of this one
//   kGather                              whether the finished rows of an owner go to every rank
//   kUneven                              whether Params::bounds says who owns which rows; else blocks of one size do
// };

}  // namespace collogue
