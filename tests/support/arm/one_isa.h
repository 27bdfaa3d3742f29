// The kernels of one instruction set are all there is: before csrc/cpu/runtime/capability.h.
#pragma once

#define EXTROPE_CALL(name, isa) name(isa)
#define EXTROPE_WIDEST(name) EXTROPE_CALL(name, EXTROPE_ISA)
