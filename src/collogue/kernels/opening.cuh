// How every kernel that communicates begins. Behind the constructors of Row and Ranks, which need nothing that a kernel may just have
// written and so run while the kernel before still does:
//
//   wait for the kernel before   from here on its results may be read
//   ask for the control words    their load is the longest way to the first send: where to, and whether at all
//   ask for what is sent         the inputs; and scales, weights that may just have been written, which come with them
//   launch the next kernel       so that its constructors run now. Not before the loads have been issued, which its CTAs would delay.
//                                It waits for the end of this kernel all the same. kLaunchLate: at the end instead, because it takes
//                                room that a kernel of another communicator may need before this one can end (docs/design.md)
//   begin the call               number, stop word and generation follow from the control words
//   [send]                       nothing stands in front of the first send that is not in this list
//   announce                     count the warps that have read the control words; journal and marks
//   look at the marks            of the call before: every rank has marked that before it began this one. The answer is used later
//   clean                        what a one-shot call before has left
//   pad                          padding of the scale tensor
//   get ready                    weights as numbers, tables, the cluster's barriers: all that need not stand in front of the sends
//   compare                      the marks: at once where a CTA does several rows, for the sake of two registers; else while something
//                                travels, or at the end
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
struct Opening {
  Ranks<C>& ranks;
  Pair seen = {{0, 0}};
  bool first_warp = false;  // of the grid

  COLLOGUE_DEVICE explicit Opening(Ranks<C>& r) : ranks(r) {}

  // To the sends. `load()` asks for what is sent; `row`: a Row, or a RowPlace where rows are only moved.
  template <class Place, class Load>
  COLLOGUE_DEVICE void begin(Place& row, Load load) const {
    wait_for_previous_kernel();
    ranks.ask();
    load();
    row.ask();
    if constexpr (!C::kLaunchLate) launch_next_kernel();
    ranks.begin_call();
  }
  // From the first sends on, once. One-shot leaves `left` bytes of its slots to the next call.
  template <class Place>
  COLLOGUE_DEVICE void after_sends(Place& row, u32 left = 0) {
    // Worked out while words travel, not before they leave.
    u32 cta = grid_row() * blocks_in_row() + block_in_row(), scale_rows = ranks.p.scale_rows;
    compute_now(cta);
    compute_now(scale_rows);
    const u32 thread = cta * C::kThreads + thread_index(), threads = grid_rows() * blocks_in_row() * C::kThreads;
    ranks.announce(thread, threads / 32, left);
    first_warp = thread / 32 == 0;
    if (first_warp) seen = ranks.look_at_marks(ranks.call - 1);
    ranks.clean(thread, threads);
    row.codes.pad(scale_rows, thread, threads);
    row.get_ready();
    if constexpr (C::kLoop) compare();
  }
  // At the end, when nothing is waited for any more.
  COLLOGUE_DEVICE void end() const {
    if constexpr (C::kLaunchLate) launch_next_kernel();
    if (ranks.stopped) ranks.report();
  }
  // Where something else is waited for, or before end().
  COLLOGUE_DEVICE void compare_later() const {
    if constexpr (!C::kLoop) compare();
  }

 private:
  COLLOGUE_DEVICE void compare() const {
    if (first_warp) ranks.compare_previous_call(seen);
  }
};

}  // namespace collogue
