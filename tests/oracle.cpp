// NVIDIA's own host conversions, behind a C interface. Used by tests only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#include <cstdint>
#include <cstring>

template <class F>
static void each(int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) f(i);
}

extern "C" {
void e2m1_encode(const float* x, uint8_t* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __nv_cvt_float_to_fp4(x[i], __NV_E2M1, cudaRoundNearest); });
}
void e4m3_encode(const float* x, uint8_t* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3); });
}
void e2m1_decode(const uint8_t* codes, float* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __half2float(__half(__nv_cvt_fp4_to_halfraw(codes[i], __NV_E2M1))); });
}
void e4m3_decode(const uint8_t* codes, float* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(codes[i], __NV_E4M3))); });
}
void e8m0_decode(const uint8_t* codes, float* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __bfloat162float(__nv_bfloat16(__nv_cvt_e8m0_to_bf16raw(codes[i]))); });
}
void to_bfloat16(const float* x, uint16_t* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i])); });
}
void to_float16(const float* x, uint16_t* out, int64_t n) {
    each(n, [&](int64_t i) { out[i] = __half_as_ushort(__float2half_rn(x[i])); });
}
}
