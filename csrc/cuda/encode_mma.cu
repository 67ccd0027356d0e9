// encode of 16-bit features on tensor cores: the launches that encode.cu declares, in a file of their own so that the
// two, and encode_tf32.cu, are compiled at the same time.
#include "launch.h"

#include "encode_mma_run.cuh"

namespace rendseg::encoding {

template void run_mma<half_t>(CudaLaunch&, const MmaArgs&, const MmaFit&);
template void run_mma<bfloat16_t>(CudaLaunch&, const MmaArgs&, const MmaFit&);

}  // namespace rendseg::encoding
