// The kernels of topk_attention_cpu.inl for the instruction set in this file's name (flags: tools/isa_flags.json).
#include "topk_attention/topk_attention_cpu.inl"
