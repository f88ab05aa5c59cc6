// What a format and a scale layout are to the kernels: a type each, named by Config::Format and Config::Layout. formats/ holds the
// formats, layouts.cuh the layouts; collogue/planning/variant.py has a row for each.
#pragma once
#include "encode.cuh"
#include "exchange.cuh"
#include "params.cuh"

namespace collogue {

// Codes of eight elements, and the scale of their group: a byte, or the bits of a float.
template <u32 kBytes>
struct Codes {
  u32 w[kBytes < 8 ? 1 : 2];
  u32 scale;
};

// What a format has, with what most of them have in common. Besides:
//   kCodeBytes    of the codes of eight elements: 4 or 8; 0: nothing is quantized
//   kScaleBytes   of a stored scale: 1 or 4; 0: none is stored
//   kGroup        elements that share a stored scale; 0: a stored scale is the row's
//   encode(p, eight rounded elements, largest magnitude of their group or row) -> Codes<kCodeBytes>; all lanes
struct FormatDefaults {
  static constexpr u32 kScalesInWord = 1;      // on their way to other ranks: 4 where a warp holds four groups
  static constexpr u32 kTurned = 0;            // exclusive-ored with such a word, so that it cannot look like a sentinel
  static constexpr bool kFillsShared = false;  // prepare() writes shared memory: a barrier follows
  struct Shared {};
  // Before the previous kernel has ended: needs nothing that a kernel may have written.
  template <class C>
  COLLOGUE_DEVICE void prepare(const Params&, Shared&) {}
  // Asks for what a kernel may have written, together with the inputs.
  COLLOGUE_DEVICE void ask(const Params&) {}
  // Before the first encode(), where there is time. All threads of the CTA.
  template <class C>
  COLLOGUE_DEVICE void get_ready(const Params&, Shared&) {}
};

}  // namespace collogue
