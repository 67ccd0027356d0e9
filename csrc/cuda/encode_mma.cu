// encode of 16-bit features on tensor cores: the launches that encode.cu declares, in a file of their own so that the
// two, and encode_tf32.cu, are compiled at the same time.
#include "launch.h"

#include "encode.cuh"
#include "encode_mma.cuh"
#include "encode_tf32.cuh"

namespace rendseg::encoding {

template bool run_encode_mma<half_t>(CudaLaunch&, const MmaArgs&, bool);
template bool run_encode_mma<bfloat16_t>(CudaLaunch&, const MmaArgs&, bool);
template bool run_encode_mma_backward<half_t>(CudaLaunch&, const MmaArgs&, bool);
template bool run_encode_mma_backward<bfloat16_t>(CudaLaunch&, const MmaArgs&, bool);

}  // namespace rendseg::encoding
