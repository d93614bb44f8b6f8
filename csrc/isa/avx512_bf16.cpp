#define GPT4V_FAST_ISA avx512_bf16
#include "isa/table.h"
