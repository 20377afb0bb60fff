// Marks for functions that run on a GPU and on a CPU. No CUDA header needed.
#pragma once

#if defined(__CUDACC__)
#define PYML_HD __host__ __device__ __forceinline__
#define PYML_UNROLL _Pragma("unroll")
#else
#define PYML_HD inline
#define PYML_UNROLL
#endif
