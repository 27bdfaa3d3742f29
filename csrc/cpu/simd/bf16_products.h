// Products of bf16 tiles by AMX or AVX-512. The sums are 32 x 32 floats.
#pragma once

#if defined(__AMX_BF16__)
#include "cpu/simd/bf16_products_amx.h"
#else
#include "cpu/simd/bf16_products_avx512.h"
#endif
