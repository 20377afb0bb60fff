// The loops of machine_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "common/machine_cpu.inl"
