// The kernels of batched_ot_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "batched_ot/batched_ot_cpu.inl"
