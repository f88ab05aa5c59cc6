// Nothing is quantized.
#pragma once
#include "format.cuh"

namespace collogue {

struct NoFormat : FormatDefaults {
  static constexpr u32 kCodeBytes = 0, kScaleBytes = 0;
  static constexpr int kGroup = 0;
};

}  // namespace collogue
