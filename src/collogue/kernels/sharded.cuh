// Sharded: every rank owns a block of rows, and the residual of those rows only. Each sends its terms of a row to the owner, who adds
// them and the residual, keeps y, finishes the row and sends what is finished to everybody (kGather), or keeps that as well.
// Turn r does row r of every owner: the terms of the next turn leave first, then this turn's own row, then the others' rows
// of the turn before are put in their places.
#pragma once
#include "gather.cuh"
#include "opening.cuh"
#include "source.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void sharded(const Params& p) {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  // Else a rank that owns no row would wait for nobody, and could run ahead by more calls than there are generations.
  static_assert(!C::kGather || C::kKeepNorm || C::Format::kCodeBytes != 0);
  COLLOGUE_SHARED(typename Row<C>::Shared, shared);
  Row<C> row(p, shared);
  Ranks<C> ranks(p);
  typename C::template Source<C> source(row);
  const WireRow<C> wire(p);
  const u32 end = p.first + p.count, step = grid_rows(), row_bytes = p.hidden * D::kBytes;
  const u32 gather_offset = Ranks<C>::kPeers * p.slot_bytes;
  u32 r = p.first + grid_row();

  Opening<C> opening(ranks);
  opening.begin(row, [] {});

  // Row `of` of every other owner: this rank's terms, as many at a time as registers hold; where they are worked out, one.
  const auto give = [&](u32 of) {
    constexpr int kBatch = 8 / D::kParts;
    const u32 offset = (of - p.first) * row_bytes;
    if constexpr (C::template Source<C>::kWorkedOut) {
#pragma unroll 1
      for (u32 k = 1; k < C::kWorld; k++) {
        const u32 peer = ranks.next_peer(k), t = ranks.row_of(peer, of);
        if (!ranks.owns(peer, t)) continue;
#pragma unroll 1
        for (int i = 0; i < C::kVectors; i++) {
          const u32 at = offset + row.vector(i) * 8 * D::kBytes;
          const Vector x = source.term(t, i);
          if (row.active(i) && !ranks.stopped && at < p.slot_bytes) ranks.send_vector(ranks.target(k) + at, ranks.disguise(x));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        const u32 at = offset + row.vector(i) * 8 * D::kBytes;
#pragma unroll
        for (int first = 1; first < C::kWorld; first += kBatch) {
          Vector x[kBatch];
#pragma unroll
          for (int k = first; k < C::kWorld && k < first + kBatch; k++) {
            const u32 peer = ranks.next_peer(k), t = ranks.row_of(peer, of);
            if (ranks.owns(peer, t)) x[k - first] = source.term(t, i);
          }
#pragma unroll
          for (int k = first; k < C::kWorld && k < first + kBatch; k++) {
            const u32 peer = ranks.next_peer(k), t = ranks.row_of(peer, of);
            if (ranks.owns(peer, t) && row.active(i) && !ranks.stopped && at < p.slot_bytes)
              ranks.send_vector(ranks.target(k) + at, ranks.disguise(x[k - first]));
          }
        }
      }
    }
  };
  // Row `of` of every other owner, finished.
  const auto take = [&](u32 of) {
#pragma unroll 1
    for (u32 k = 1; k < C::kWorld; k++) {
      const u32 owner = ranks.next_peer(k), t = ranks.row_of(owner, of);
      if (!ranks.owns(owner, t)) continue;
      u8* const place = ranks.own + p.data_offset + ranks.generation + gather_offset + ranks.position(owner, p.rank) * p.gather_bytes;
      row.aim_finished(t);
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        Arrival<C> arrival(row, wire, place + (of - p.first) * p.wire_bytes, i);
        ranks.wait([&] { return arrival.load(); }, [&] { return arrival.load() ? owner : kNobody; }, kStageRows, t);
        if (!ranks.stopped) arrival.put(row, i);
      }
    }
  };

  give(r);
  opening.after_sends(row);

  u32 turn = 0;
  for (; r < end; r += step) {
    const u32 t = ranks.row_of(p.rank, r);
    const bool mine = ranks.owns(p.rank, t);
    Vector x[C::kVectors], residual{};
    if constexpr (C::kVectors == 1)
      if (mine) {
        x[0] = source.term(t, 0);
        if constexpr (C::kResidual) residual = row.load(p.residual + row.offset(r), 0);
      }
    if (r + step < end) give(r + step);
    if (mine) {
      if (turn) row.next();
      row.aim(C::kGather ? t : r, r);
      const u32 offset = (r - p.first) * row_bytes;
      u8* targets[C::kWorld];
      if constexpr (C::kGather) {
#pragma unroll
        for (int k = 1; k < C::kWorld; k++) {
          const u32 peer = ranks.next_peer(k);
          targets[k] = p.workspace[peer] + p.data_offset + ranks.generation + gather_offset + ranks.position(p.rank, peer) * p.gather_bytes + (r - p.first) * p.wire_bytes;
        }
      }
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        const u32 at = offset + row.vector(i) * 8 * D::kBytes;
        if constexpr (C::kVectors > 1) {
          x[i] = source.term(t, i);
          if constexpr (C::kResidual) residual = row.load(p.residual + row.offset(r), i);
        }
        float sum[8];
        ranks.receive_and_add(ranks.disguise(x[i]), ranks.slots() + at, row.active(i), t, sum);
        if constexpr (C::kBranch) {
          x[i] = D::round(sum);
          continue;
        }
        if constexpr (C::kResidual) add<D>(sum, residual);
        x[i] = row.store_stream(i, sum);
      }
      if constexpr (C::kBranch)
        row.join(turn, x, [&](int i) { return C::kVectors == 1 ? residual : row.load(p.residual + row.offset(r), i); });
      const auto wipe = [&] {
#pragma unroll
        for (int i = 0; i < C::kVectors; i++) ranks.wipe_terms(offset + row.vector(i) * 8 * D::kBytes, row.active(i));
      };
      if constexpr (C::kGather)
        row.finish(turn, x, wipe, WireSender<C>{wire, targets, row.vector(0), p.hidden, ranks.stopped || (r - p.first + 1) * p.wire_bytes > p.gather_bytes});
      else
        row.finish(turn, x, wipe, NoWire{});
      turn++;
    }
    if (C::kGather && r >= p.first + step) take(r - step);
  }
  if (C::kGather && p.count > grid_row()) take(r - step);
  // A rank that owns no row waits for nobody, and would run ahead: it must know that all have come this far.
  if (!C::kGather && opening.first_warp) ranks.wait_for_marks();
  opening.compare_later();
  opening.end();
}

}  // namespace collogue
