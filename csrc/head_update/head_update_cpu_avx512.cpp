// The kernels of head_update_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "head_update/head_update_cpu.inl"
