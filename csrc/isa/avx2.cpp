#define GPT4V_FAST_ISA avx2
#include "isa/table.h"
