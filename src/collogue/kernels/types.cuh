// What the device and the emulator both name.
#pragma once

namespace collogue {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// 16 bytes: what one thread moves at a time.
struct alignas(16) Words {
  u32 w[4];
};

}  // namespace collogue
