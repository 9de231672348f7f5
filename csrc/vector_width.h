// One build for every x86-64: functions so marked are compiled for AVX-512, AVX2 and the baseline, and the loader picks.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_EACH_VECTOR_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define FOR_EACH_VECTOR_WIDTH
#endif

// The kernel of bf16_mm_ needs a compiler that knows AMX, and Linux for the leave to use it.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define BUILDS_BF16_MM
#endif
