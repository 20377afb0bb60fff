// The kernels of bspline_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "bspline/bspline_cpu.inl"
