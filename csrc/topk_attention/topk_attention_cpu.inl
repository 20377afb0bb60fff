// CPU kernels of the top-k attention family over ranges: raw pointers, no Tensor, no threads. Included once for each
// instruction set.
#include "topk_attention/region_attention_bwd_cpu.inl"
#include "topk_attention/region_attention_cpu.inl"
#include "topk_attention/route_regions_cpu.inl"
#include "topk_attention/topk_attention_fwd_cpu.inl"
