// How a step of refine is shared out, for test_refine_blocks.py.
#include "../../csrc/cuda/refine.cuh"

extern "C" {

// Points to a block for a head with one feature map and three hidden layers of 256; 0: it does not fit. `bytes` gets
// the shared memory of a block and the size of the packed weights.
int rendseg_refine_block(int64_t element_bytes, int64_t classes, int64_t channels, int64_t points, int processors,
                         int64_t shared_limit, int64_t* bytes) {
  using namespace rendseg;
  const int64_t outs[] = {256, 256, 256, classes};
  RefineHead head;
  if (!plan_refine(head, element_bytes, classes, &channels, 1, outs, 4, true, false)) return -1;
  const int size = refine_points_per_block(head, 2, points, processors, shared_limit);
  bytes[0] = refine_shared_bytes(head, 2, size);
  bytes[1] = head.words * static_cast<int64_t>(sizeof(uint2));
  return size;
}
}
