// Where the scale of a group lies in its tensor, and the padding there. A layout is a type:
//   offset(row, group, groups of a row, column stride)  in bytes
//   pad(scales, rows, groups of a row, column stride, thread, threads)  writes what is padding, by all threads of the grid together,
//                                                       whose number is a multiple of 32
// Strides are in elements between the columns of a column-major tensor.
#pragma once
#include "ptx.cuh"

namespace collogue {

// Row-major.
template <u32 kScaleBytes>
struct Linear {
  static COLLOGUE_DEVICE u64 offset(u32 t, u32 k, u32 groups, u32) { return (static_cast<u64>(t) * groups + k) * kScaleBytes; }
  static COLLOGUE_DEVICE void pad(u8*, u32, u32, u32, u32, u32) {}
};

// Bytes that complete the last word of every row: columns come in fours.
template <class Layout>
COLLOGUE_DEVICE void pad_columns(u8* scales, u32 rows, u32 groups, u32 column_stride, u32 thread, u32 threads) {
  const u32 last = groups - 1, missing = 3 - last % 4;
#pragma unroll 1
  for (u32 i = thread; missing && i < rows; i += threads)
#pragma unroll 1
    for (u32 j = 1; j <= missing; j++) (scales + Layout::offset(i, last, groups, column_stride))[j] = 0;
}

// Tiles of 128 rows and 4 columns, 512 bytes: row r of a tile is chunk r % 32, word r / 32.
struct Tiles128x4 {
  static COLLOGUE_DEVICE u64 offset(u32 t, u32 k, u32 groups, u32) {
    const u32 tiles = (groups + 3) / 4;
    return ((static_cast<u64>(t / 128) * tiles + k / 4) * 128 + t % 32 * 4 + t / 32 % 4) * 4 + k % 4;
  }
  static COLLOGUE_DEVICE void pad(u8* scales, u32 rows, u32 groups, u32 column_stride, u32 thread, u32 threads) {
    pad_columns<Tiles128x4>(scales, rows, groups, column_stride, thread, threads);
    if (rows % 128 == 0) return;
    const u32 tiles = (groups + 3) / 4, last = rows / 128, used = rows % 128;
    u8* const tile = scales + static_cast<u64>(last) * tiles * 512;
    const u32 row = thread % 32;
    u8* chunk = tile + thread * 16;  // of rows `row`, + 32, + 64, + 96
#pragma unroll 1
    for (u32 i = thread; i < tiles * 32; i += threads, chunk += threads * 16) {
      compute_now(chunk);
      if (row >= used) store(chunk, Words{{0, 0, 0, 0}});
#pragma unroll
      for (u32 j = 1; j < 4; j++)
        if (row < used && row + 32 * j >= used) store_word(chunk + j * 4, 0u);
    }
  }
};

// Tiles of 8 rows and 4 columns, 32 bytes.
struct Tiles8x4 {
  static COLLOGUE_DEVICE u64 offset(u32 t, u32 k, u32 groups, u32) {
    const u32 tiles = (groups + 3) / 4;
    return ((static_cast<u64>(t / 8) * tiles + k / 4) * 8 + t % 8) * 4 + k % 4;
  }
  static COLLOGUE_DEVICE void pad(u8* scales, u32 rows, u32 groups, u32 column_stride, u32 thread, u32 threads) {
    pad_columns<Tiles8x4>(scales, rows, groups, column_stride, thread, threads);
    const u32 tiles = (groups + 3) / 4, last = rows / 8, used = rows % 8;
    if (used == 0) return;
    if (thread % 8 < used) return;
    u8* const tile = scales + static_cast<u64>(last) * tiles * 32;
#pragma unroll 1
    for (u32 i = thread; i < tiles * 8; i += threads) store_word(tile + i * 4, 0u);
  }
};

// The words behind the last row of `columns` columns.
COLLOGUE_DEVICE void pad_rows(u8* scales, u32 rows, u32 columns, u32 column_stride, u32 thread, u32 threads) {
  const u32 missing = column_stride - rows;
#pragma unroll 1
  for (u32 i = thread; i < columns * missing; i += threads)
    store_word(scales + (static_cast<u64>(i / missing) * column_stride + rows + i % missing) * 4, 0u);
}

// Column-major, a float each.
struct Column {
  static COLLOGUE_DEVICE u64 offset(u32 t, u32 k, u32, u32 column_stride) { return (static_cast<u64>(k) * column_stride + t) * 4; }
  static COLLOGUE_DEVICE void pad(u8* scales, u32 rows, u32 groups, u32 column_stride, u32 thread, u32 threads) {
    pad_rows(scales, rows, groups, column_stride, thread, threads);
  }
};

// Column-major, four bytes to a word: of four groups.
struct PackedColumn {
  static COLLOGUE_DEVICE u64 offset(u32 t, u32 k, u32, u32 column_stride) {
    return (static_cast<u64>(k / 4) * column_stride + t) * 4 + k % 4;
  }
  static COLLOGUE_DEVICE void pad(u8* scales, u32 rows, u32 groups, u32 column_stride, u32 thread, u32 threads) {
    pad_columns<PackedColumn>(scales, rows, groups, column_stride, thread, threads);
    pad_rows(scales, rows, (groups + 3) / 4, column_stride, thread, threads);
  }
};

}  // namespace collogue
