// encode of float32 features on tensor cores: the launches that encode.cu declares; see encode_mma.cu.
#include "launch.h"

#include "encode.cuh"
#include "encode_mma.cuh"
#include "encode_tf32.cuh"

namespace rendseg::encoding {

template bool run_encode_mma<float>(CudaLaunch&, const MmaArgs&, bool);
template bool run_encode_mma_backward<float>(CudaLaunch&, const MmaArgs&, bool);

}  // namespace rendseg::encoding
