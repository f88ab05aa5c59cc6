// One-shot: every rank sends its rows to every peer, adds all terms itself and finishes the row. One cluster per row.
#pragma once
#include "opening.cuh"
#include "source.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void one_shot(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  Ranks<C> ranks(p);
  typename C::template Source<C> source(row);
  u32 t = grid_row(), slot_offset = static_cast<u32>(row.offset(t));
  source.aim(t);
  const u8* residual = C::kResidual ? p.residual + row.offset(t) : nullptr;
  compute_now(slot_offset ^ source.digest() ^ folded(residual) ^ ranks.digest(), shared.digest);

  // A single vector stays in registers, and so does what is worked out; several are read again when their turn comes.
  constexpr bool kAgain = C::kVectors > 1 && !C::template Source<C>::kWorkedOut;
  Vector x[C::kVectors], r{};
  Opening<C> opening(ranks);
  opening.begin(row, [&] {
    ask_for_terms(source, x, 0);
    if constexpr (C::kResidual && C::kVectors == 1) r = row.load(residual, 0);
  });
  for (u32 turn = 0;; turn++) {
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      x[i] = ranks.disguise(x[i]);
      ranks.send(x[i], slot_offset + i * row.kVectorStep, row.active(i));
    }
    ranks.sent_at = clock_cycles();
    // What follows is worked out while the words travel, not before they leave.
    compute_now(t);
    row.aim(t);
    if (turn == 0) opening.after_sends(row, Ranks<C>::kPeers * p.slot_bytes);
    const u8* place = ranks.slots() + slot_offset;
    u32 active = row.active(0);
    compute_now(place);
    compute_now(active);
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      if constexpr (kAgain) x[i] = ranks.disguise(source.term(t, i));
      if constexpr (C::kVectors > 1) {
        if constexpr (C::kResidual && !C::kBranch) r = row.load(p.residual + row.offset(t), i);
      }
      float sum[8];
      ranks.receive_and_add(x[i], place + i * row.kVectorStep, C::kVectors == 1 ? active : row.active(i), t, sum);
      if constexpr (C::kBranch) {
        x[i] = D::round(sum);
        continue;
      }
      if constexpr (C::kResidual) add<D>(sum, r);
      x[i] = row.store_stream(i, sum);
    }
    if constexpr (C::kBranch) row.join(turn, x, [&](int i) { return C::kVectors == 1 ? r : row.load(p.residual + row.offset(t), i); });
    row.finish(turn, x, [&] { opening.compare_later(); }, NoWire{});

    if constexpr (!C::kLoop) break;
    t += grid_rows();
    if (t >= p.tokens) break;
    row.next();
    slot_offset = static_cast<u32>(row.offset(t));
    source.aim(t);
    ask_for_terms(source, x, 0);
    if constexpr (C::kResidual && C::kVectors == 1) r = row.load(p.residual + row.offset(t), 0);
  }
  opening.end();
}

}  // namespace collogue
