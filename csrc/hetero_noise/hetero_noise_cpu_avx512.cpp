// The kernels of hetero_noise_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "hetero_noise/hetero_noise_cpu.inl"
