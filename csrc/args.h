// What every kernel takes: plain views and scalars. Translation units of every ISA include it, so it holds nothing but
// plain data (and templates that the bindings alone instantiate): an inline function here could be kept by the linker
// in its AVX-512 copy for everybody.
#pragma once

#include "attention/args.h"
#include "loss/args.h"
#include "patch_embed/args.h"
#include "view.h"
