// A finished row on its way from its owner to every other rank: the norm, the codes and the scales of every vector, in the
// order and the size in which threads work them out. Words that have not arrived hold the sentinel, as everywhere.
//
// No finished word looks like a sentinel: values and float scales have no negative zero, E2M1 codes no nibble 8, E4M3 codes and
// scales no byte 0x80, each of which both sentinels hold. E8M0 bytes have no 0xFE; they travel with Format::kTurned, which makes it 0x80.
#pragma once
#include "protocol.cuh"
#include "row.cuh"

namespace collogue {

template <class C>
struct WireRow {
  using D = typename C::D;
  using Vector = Packed<D::kParts>;
  using Format = typename C::Format;
  using G = Groups<Format>;
  using Codes = collogue::Codes<Format::kCodeBytes>;
  static constexpr bool kCodes = Format::kCodeBytes != 0;
  static constexpr u32 kVectorBytes = kVector * D::kBytes;
  // Bytes of scales travel in fours, as words that one warp holds; other scales as a word each.
  static constexpr bool kFours = Format::kScalesInWord == 4;
  static constexpr bool kScaleWords = Format::kScaleBytes != 0;
  static constexpr u32 kVectorsOfWord = G::kVectors * Format::kScalesInWord;

  u32 codes_offset, scales_offset;  // of the first code and scale word in a row

  COLLOGUE_DEVICE explicit WireRow(const Params& p)
      : codes_offset(C::kKeepNorm ? p.hidden * D::kBytes : 0), scales_offset(codes_offset + p.hidden / 8 * Format::kCodeBytes) {}

  // Where the scale of vector c lies; the word's first vector is the one whose thread sends and wipes it.
  COLLOGUE_DEVICE u32 scale_offset(u32 c) const {
    return scales_offset + (G::kPerRow ? 0 : c / kVectorsOfWord) * 4;
  }
  static COLLOGUE_DEVICE bool leads_word(u32 c) { return G::kPerRow ? c == 0 : c % kVectorsOfWord == 0; }
  // The word that holds the scale of this lane's vector; zeros for groups past the end of the row. All lanes.
  static COLLOGUE_DEVICE u32 scale_word(u32 scale, u32 c, bool active) {
    if constexpr (!kFours) return scale;
    constexpr u32 kPer = G::kVectors;
    u32 w = active ? scale << (c / kPer % 4 * 8) : 0u;
#pragma unroll
    for (u32 distance = kPer; distance < 4 * kPer; distance *= 2) w |= exchange_lanes(w, static_cast<int>(distance));
    return w ^ Format::kTurned;
  }
  static COLLOGUE_DEVICE u32 scale_of_word(u32 word, u32 c) {
    if constexpr (!kFours) return word;
    return (word ^ Format::kTurned) >> (c / G::kVectors % 4 * 8) & 0xffu;
  }
};

// Sends what Row::finish works out of one row to the same place of every peer.
template <class C>
struct WireSender {
  using Wire = WireRow<C>;
  const Wire& wire;
  u8* const (&targets)[C::kWorld];  // of the row's first byte, by peer
  u32 first_vector;                 // of this thread
  u32 hidden;
  bool silent;

  COLLOGUE_DEVICE u32 vector(int i) const { return first_vector + 32 * i; }
  COLLOGUE_DEVICE bool active(int i) const { return !silent && vector(i) * 8 < hidden; }
  COLLOGUE_DEVICE void norm(int i, const typename Wire::Vector& v) const {
    if (!active(i)) return;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) Ranks<C>::send_vector(targets[k] + vector(i) * Wire::kVectorBytes, v);
  }
  COLLOGUE_DEVICE void codes(int i, const typename Wire::Codes& v) const {
    const u32 c = vector(i);
    u32 word = 0;
    if constexpr (Wire::kScaleWords) word = Wire::scale_word(v.scale, c, c * 8 < hidden);
    if (!active(i)) return;
#pragma unroll
    for (int k = 1; k < C::kWorld; k++) {
      u8* const code = targets[k] + wire.codes_offset + c * Wire::Format::kCodeBytes;
      if constexpr (Wire::Format::kCodeBytes == 4)
        store_word_to_peer(reinterpret_cast<u32*>(code), v.w[0]);
      else
        store_pair_to_peer(code, Pair{{v.w[0], v.w[1]}});
      if constexpr (Wire::kScaleWords)
        if (Wire::leads_word(c)) store_word_to_peer(reinterpret_cast<u32*>(targets[k] + wire.scale_offset(c)), word);
    }
  }
};

// Vector i of this thread in a row that arrives at `place`, to be put where the row was aimed at.
template <class C>
struct Arrival {
  using Wire = WireRow<C>;
  using D = typename C::D;
  using Format = typename Wire::Format;
  using G = typename Wire::G;
  u32 c;
  bool active, has_scale;
  u8 *values_place, *codes_place, *scale_place;
  typename Wire::Vector values;
  typename Wire::Codes codes;
  u32 word;

  COLLOGUE_DEVICE Arrival(const RowPlace<C>& row, const Wire& wire, u8* place, int i)
      : c(row.vector(i)), active(row.active(i)), has_scale(Wire::kScaleWords && active && G::leads(c)),
        values_place(place + c * Wire::kVectorBytes), codes_place(place + wire.codes_offset + c * Format::kCodeBytes),
        scale_place(place + wire.scale_offset(c)), values{}, codes{}, word(0) {}

  // Whether a word still holds the sentinel.
  COLLOGUE_DEVICE bool load() {
    bool missing = false;
    if (!active) return missing;
    if constexpr (C::kKeepNorm) {
      values = Ranks<C>::load_arrived(values_place);
      missing |= Ranks<C>::is_missing(values);
    }
    if constexpr (Format::kCodeBytes == 4) {
      codes.w[0] = load_peer_written_word(reinterpret_cast<u32*>(codes_place));
      missing |= codes.w[0] == D::kSentinel;
    } else if constexpr (Wire::kCodes) {
      const Pair pair = load_peer_written_pair(codes_place);
      codes.w[0] = pair.w[0];
      codes.w[1] = pair.w[1];
      missing |= pair.w[0] == D::kSentinel || pair.w[1] == D::kSentinel;
    }
    if (has_scale) {
      word = load_peer_written_word(reinterpret_cast<u32*>(scale_place));
      missing |= word == D::kSentinel;
    }
    return missing;
  }
  // Writes it to the outputs and makes its places clean again. After all lanes of the warp have loaded.
  COLLOGUE_DEVICE void put(const RowPlace<C>& row, int i) {
    if (!active) return;
    if constexpr (C::kKeepNorm) {
      row.store_norm(i, values);
      Ranks<C>::wipe_vector(values_place);
    }
    if constexpr (Wire::kCodes) {
      codes.scale = Wire::scale_of_word(word, c);
      row.codes.write(codes, i, c, true);
      store_word(codes_place, D::kSentinel);
      if constexpr (Format::kCodeBytes == 8) store_word(codes_place + 4, D::kSentinel);
      if (Wire::kScaleWords && Wire::leads_word(c)) store_word(scale_place, D::kSentinel);
    }
  }
};

}  // namespace collogue
