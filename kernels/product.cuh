// The 4-bit product that the options ask for.
#pragma once

#if !PRECISION_NVFP4
#include "multiply_int4.cuh"
#elif BLOCK_SCALED
#include "multiply_mxf4.cuh"
#else
#include "multiply_nvfp4.cuh"
#endif
