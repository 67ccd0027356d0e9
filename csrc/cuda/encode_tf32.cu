// encode of float32 features on tensor cores: the launches that encode.cu declares; see encode_mma.cu.
#include "launch.h"

#include "encode_mma_run.cuh"

namespace rendseg::encoding {

template void run_mma<float>(CudaLaunch&, const MmaArgs&, const MmaFit&);

}  // namespace rendseg::encoding
