#define GPT4V_FAST_ISA scalar
#include "isa/table.h"
