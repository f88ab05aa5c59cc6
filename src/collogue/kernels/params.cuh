// What the host tells a kernel (mirrored by collogue/cuda.py) and what a kernel is compiled for.
#pragma once
#include "formats.cuh"

namespace collogue {

constexpr int kMaxWorld = 8;

enum class Format { kNone, kNVFP4, kMXFP4, kMXFP8, kFP8Static, kFP8PerToken, kFP8Group, kFP8GroupE8M0 };
enum class Layout { kLinear, k128x4, k8x4, kColumn };

struct Failure;

struct Params {
  const u8* partial;         // [T, H] this rank's term; the local kernel reads `world` of them, `partial_stride` bytes apart
  const u8* residual;        // [T, H]
  const u8* weight;          // [H]
  u8* stream;                // [T, H] y: the reduced tensor or the residual stream
  u8* norm;                  // [T, H]
  u8* codes;                 // [T, H] or [T, H / 2] bytes
  u8* scales;                // layout of the format
  const float* scale;        // NVFP4: multiplier g; FP8Static: divisor; null: scale_value
  u8* workspace[kMaxWorld];  // every rank's symmetric buffer, mapped here
  Failure* failure;          // pinned host memory
  u64 partial_stride;
  u64 timeout_ns;
  u32 tokens;
  u32 hidden;                // H, a multiple of 8
  u32 rank;
  u32 slot_bytes;            // one rank's slot in one generation
  u32 column_stride;         // elements between columns of a column-major scale tensor
  float eps;
  float weight_offset;
  float scale_value;
  float smallest;            // lower bound of dynamic FP8 scales
};

// struct Config {                        generated per variant
//   using D, WeightD                     value dtype, weight dtype
//   kWorld                               ranks (one-shot) or local terms
//   kResidual, kNorm, kKeepNorm          what is added, done, stored
//   kFormat, kLayout, kGroup, kCeil      quantisation; kGroup elements share a scale
//   kThreads, kVectors, kClustered       a row is kVectors * 8 elements of each thread of a CTA, of each CTA of a cluster
//   kBlocks                              upper bound of ceil(H / 256), a multiple of 4
//   kLoop                                whether a CTA may do more than one row
//   kFirstPoll                           cycles between sending and the first poll
// };

}  // namespace collogue
