// All-gather: every rank gives the rows it owns, values or codes and scales as they are, and gets everybody's. Any bits may travel, so
// a row is ready when the flag of the CTA that sent it says so, behind a release of all its stores.
#pragma once
#include "gather.cuh"
#include "opening.cuh"
#include "source.cuh"

namespace collogue {

template <class C>
COLLOGUE_DEVICE void all_gather(const Params& p) {
  using D = typename C::D;
  using Wire = WireRow<C>;
  using Format = typename C::Format;
  struct Shared {
    u32 stopped;  // of the warp that waited for all
  };
  COLLOGUE_SHARED(Shared, shared);
  RowPlace<C> row(p);
  Ranks<C> ranks(p);
  const Wire wire(p);
  const u32 end = p.first + p.count, step = grid_rows();
  const u32 cta = grid_row() * blocks_in_row() + block_in_row(), ctas = grid_rows() * blocks_in_row();
  const u32 flags_offset = Ranks<C>::kPeers * p.slot_bytes;  // [sender][CTA]
  const u32 warp = thread_index() / 32, lane = thread_index() % 32;

  Opening<C> opening(ranks);
  opening.begin(row, [] {});
  opening.after_sends(row);  // nothing is sent before: the rows are many, and need nothing of what this does

  // Own rows: to their place here and to every peer.
  for (u32 r = p.first + grid_row(); r < end; r += step) {
    const u32 t = ranks.row_of(p.rank, r), at = (r - p.first) * p.wire_bytes;
    if (!ranks.owns(p.rank, t)) break;
    row.aim_finished(t);
    u8* targets[C::kWorld];
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) targets[k] = ranks.target(k) + at;
    const WireSender<C> sender{wire, targets, row.vector(0), p.hidden, ranks.stopped || at + p.wire_bytes > p.slot_bytes};
#pragma unroll
    for (int i = 0; i < C::kVectors; i++) {
      const u32 c = row.vector(i);
      if constexpr (C::kKeepNorm) {
        const auto values = row.load(p.shard_values + row.offset(r), i);
        row.store_norm(i, values);
        sender.norm(i, values);
      }
      if constexpr (Wire::kCodes) {
        typename Wire::Codes codes{};
        if (row.active(i)) {
          const u32* const from = reinterpret_cast<const u32*>(p.shard_codes + (static_cast<u64>(r) * (p.hidden / 8) + c) * Format::kCodeBytes);
#pragma unroll
          for (u32 j = 0; j < Format::kCodeBytes / 4; j++) codes.w[j] = from[j];
          if (Wire::kScaleWords && Wire::G::leads(c)) {
            const u8* const scale = p.shard_scales + row.codes.scale_offset(r, c, p.shard_column_stride);
            codes.scale = Format::kScaleBytes == 1 ? *scale : *reinterpret_cast<const u32*>(scale);
          }
        }
        row.codes.write(codes, i, c, row.active(i));
        sender.codes(i, codes);
      }
    }
  }
  sync_block();
  if (warp == 0) {
    const bool peer = lane < C::kWorld && lane != p.rank;
    if (peer) fence_system();
    const u32 place = flags_offset + (ranks.position(p.rank, lane) * ctas + cta) * 4;
    if (peer && !ranks.stopped && place < p.generation_bytes)
      store_word_to_peer(reinterpret_cast<u32*>(p.workspace[lane] + p.data_offset + ranks.generation + place), 1u);
    u32* const flag = reinterpret_cast<u32*>(ranks.own + p.data_offset + ranks.generation + flags_offset) + ranks.position(lane, p.rank) * ctas + cta;
    const auto missing = [&] { return peer && load_peer_written_word(flag) == D::kSentinel; };
    ranks.wait(missing, [&] { return missing() ? lane : kNobody; }, kStageShard,
               smaller(ranks.row_of(C::kUneven && !peer ? p.rank : lane, p.first + grid_row()), p.tokens - 1));
    fence_system();
    if (peer && !ranks.stopped) store_word(reinterpret_cast<u8*>(flag), D::kSentinel);
    // To the other warps it is their rank that has stopped.
    if (lane == 0) shared.stopped = ranks.stopped & kFoundHere ? (ranks.stopped & 0xff00u) | (p.rank + 1) : ranks.stopped;
  }
  sync_block();
  ranks.stopped |= shared.stopped;

  // The others' rows, to their places here.
  for (u32 r = p.first + grid_row(); r < end && !ranks.stopped; r += step) {
#pragma unroll 1
    for (u32 k = 1; k < C::kWorld; k++) {
      const u32 owner = ranks.next_peer(k), t = ranks.row_of(owner, r);
      if (!ranks.owns(owner, t)) continue;
      row.aim_finished(t);
#pragma unroll
      for (int i = 0; i < C::kVectors; i++) {
        Arrival<C> arrival(row, wire, ranks.arrivals(owner) + (r - p.first) * p.wire_bytes, i);
        arrival.load();
        sync_warp();
        arrival.put(row, i);
      }
    }
  }
  opening.compare_later();
  opening.end();
}

}  // namespace collogue
