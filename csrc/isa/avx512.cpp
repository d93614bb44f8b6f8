#define GPT4V_FAST_ISA avx512
#include "isa/table.h"
