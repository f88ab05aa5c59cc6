// Where a thread's term of the sum comes from. A source is a type, named by Config::Source:
//   aim(t)   the row whose terms are asked for next
//   digest() for compute_now(): what the first load needs
//   term(i)  this rank's term of this thread's vector i, in the dtype of the sum; zeros past the end of the row
#pragma once
#include "row.cuh"

namespace collogue {

// One tensor [T, H].
template <class C>
struct DirectSource {
  const RowPlace<C>& row;
  const u8* first;  // of this thread's vectors

  COLLOGUE_DEVICE explicit DirectSource(const RowPlace<C>& r) : row(r), first(nullptr) {}
  COLLOGUE_DEVICE void aim(u32 t) { first = row.p.partial + row.offset(t); }
  COLLOGUE_DEVICE u32 digest() const { return folded(first); }
  COLLOGUE_DEVICE auto term(int i) const { return row.load(first, i); }
  COLLOGUE_DEVICE auto term(u32 t, int i) {
    aim(t);
    return term(i);
  }
};

}  // namespace collogue
