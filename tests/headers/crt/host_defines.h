// Stand-in for the header of this name in nvidia-cuda-crt: what a host compiler needs of it. CUDA's attributes mean nothing there.
#pragma once
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __CUDA_ARCH_HAS_FEATURE__(x) 0
#define CUDARTAPI
