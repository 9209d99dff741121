// Attention kernels on the emulator, one function per architecture.
#pragma once

#include "emulator/machine.h"
#include "tests/emulator/attention_case.h"

namespace pbs::emulator {

// `blocks`: thread blocks that run side by side.
template <class Config>
Fault RunSm90(AttentionCase& attention, uint32_t seed, int blocks) {
  const cuda::AttentionParams params = attention.Params();
  const cuda::Sm90Operands operands = attention.OperandsSm90();
  return Launch({.blocks = blocks,
                 .threads = Config::kThreads,
                 .resident_blocks = blocks,
                 .shared_bytes = sizeof(cuda::Sm90Shared<Config>),
                 .seed = seed},
                [&] { cuda::AttendSm90<Config>(params, operands); });
}

template <class Config>
Fault RunSm80(AttentionCase& attention, uint32_t seed, int blocks) {
  const cuda::AttentionParams params = attention.Params();
  const cuda::Sm80Operands operands = attention.OperandsSm80();
  return Launch({.blocks = params.num_tiles * Config::kParts,
                 .threads = Config::kThreads,
                 .resident_blocks = blocks,
                 .shared_bytes = sizeof(cuda::Sm80Shared<Config>),
                 .seed = seed},
                [&] { cuda::AttendSm80<Config>(params, operands); });
}

}  // namespace pbs::emulator
