// AMX's tiles on any CPU with AVX-512: included before a file, it replaces the intrinsics by exact
// arithmetic in the order that Intel's manual gives for TDPBF16PS: for each output, the even and
// the odd members of the pairs are added up apart by FMAs, the two sums are added, and then added
// to what the tile held; all rounded to nearest, with subnormal operands and results as 0. Uses of
// tiles that are not configured, or of rows that are not there, end the process. Not emulated:
// speed, and what an operating system grants.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simd/isa.h"

namespace vitkd {
// in place of isa.cpp's, which would ask the CPU
inline Isa selected_isa() { return Isa::amx; }
inline bool contains(Isa, Isa) { return true; }
}  // namespace vitkd

namespace amx_emulator {

struct Tiles {
  bool configured = false;
  int row_bytes[8] = {}, rows[8] = {};
  alignas(64) uint8_t data[8][16][64] = {};
};
inline thread_local Tiles tiles;

inline void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "AMX emulator: %s\n", what);
  std::abort();
}

inline void load_config(const void* from) {
  uint8_t config[64];
  std::memcpy(config, from, 64);
  expect(config[0] == 1, "the palette is not 1");
  tiles = {};
  tiles.configured = true;
  for (int i = 0; i < 8; ++i) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * i, 2);
    tiles.row_bytes[i] = bytes, tiles.rows[i] = config[48 + i];
    expect(bytes <= 64 && config[48 + i] <= 16, "a tile is larger than 16 rows of 64 bytes");
  }
}

inline void release() { tiles.configured = false; }

inline void expect_tile(int tile) {
  expect(tiles.configured && tiles.rows[tile] > 0, "a tile is used that was not configured");
}

inline void zero(int tile) {
  expect_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride,
                tiles.row_bytes[tile]);
  }
}

inline void store(int tile, void* to, int64_t stride) {
  expect_tile(tile);
  for (int row = 0; row < tiles.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row],
                tiles.row_bytes[tile]);
  }
}

__attribute__((target("avx512f"))) inline void dot_bf16(int sum, int left, int right) {
  for (const int tile : {sum, left, right}) expect_tile(tile);
  expect(tiles.rows[left] == tiles.rows[sum] && tiles.row_bytes[right] == tiles.row_bytes[sum] &&
             tiles.row_bytes[left] == 4 * tiles.rows[right],
         "the tiles of a product do not fit each other");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);  // no exceptions, to nearest
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int row = 0; row < tiles.rows[sum]; ++row) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < tiles.rows[right]; ++k) {
      int32_t pair;
      std::memcpy(&pair, tiles.data[left][row] + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(tiles.data[right][k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)),
                            _mm512_castsi512_ps(_mm512_and_si512(b, upper)), odd);
    }
    uint8_t* const to = tiles.data[sum][row];
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
  }
  _mm_setcsr(before);
}

}  // namespace amx_emulator

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) amx_emulator::load_config(from)
#define _tile_release() amx_emulator::release()
#define _tile_zero(tile) amx_emulator::zero(tile)
#define _tile_loadd(tile, from, stride) amx_emulator::load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_emulator::store(tile, to, stride)
#define _tile_dpbf16ps(sum, left, right) amx_emulator::dot_bf16(sum, left, right)
