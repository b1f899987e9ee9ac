// CUDA's built-in vector types, with the alignment that the device asks of them.
#pragma once

#include <cstdint>

#define WSYNC_EMULATOR_VECTOR2(name, type, alignment) \
  struct alignas(alignment) name {                    \
    type x, y;                                        \
  };                                                  \
  inline name make_##name(type x, type y) { return {x, y}; }

#define WSYNC_EMULATOR_VECTOR4(name, type, alignment) \
  struct alignas(alignment) name {                    \
    type x, y, z, w;                                  \
  };                                                  \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

WSYNC_EMULATOR_VECTOR2(uchar2, unsigned char, 2)
WSYNC_EMULATOR_VECTOR2(short2, short, 4)
WSYNC_EMULATOR_VECTOR2(ushort2, unsigned short, 4)
WSYNC_EMULATOR_VECTOR2(int2, int, 8)
WSYNC_EMULATOR_VECTOR2(uint2, unsigned int, 8)
WSYNC_EMULATOR_VECTOR2(float2, float, 8)
WSYNC_EMULATOR_VECTOR2(longlong2, long long, 16)
WSYNC_EMULATOR_VECTOR2(ulonglong2, unsigned long long, 16)
WSYNC_EMULATOR_VECTOR4(uchar4, unsigned char, 4)
WSYNC_EMULATOR_VECTOR4(short4, short, 8)
WSYNC_EMULATOR_VECTOR4(ushort4, unsigned short, 8)
WSYNC_EMULATOR_VECTOR4(int4, int, 16)
WSYNC_EMULATOR_VECTOR4(uint4, unsigned int, 16)
WSYNC_EMULATOR_VECTOR4(float4, float, 16)

#undef WSYNC_EMULATOR_VECTOR2
#undef WSYNC_EMULATOR_VECTOR4

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
