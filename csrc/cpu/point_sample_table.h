// No include guard: the table of one instruction set, after isa_end.h. The function that makes a table runs on every
// processor, so it must be compiled without that set.
#if RENDSEG_ISA == 2
#define RENDSEG_SAMPLE_KERNELS sample_kernels_avx512
#define RENDSEG_SAMPLE_NAMESPACE avx512
#elif RENDSEG_ISA == 1
#define RENDSEG_SAMPLE_KERNELS sample_kernels_avx2
#define RENDSEG_SAMPLE_NAMESPACE avx2
#else
#define RENDSEG_SAMPLE_KERNELS sample_kernels_baseline
#define RENDSEG_SAMPLE_NAMESPACE baseline
#endif

namespace rendseg {

template <typename T>
SampleKernels<T> RENDSEG_SAMPLE_KERNELS() {
  namespace set = RENDSEG_SAMPLE_NAMESPACE;
  return {set::locate<acc_t<T>>, set::planes<T>,    set::vectors<T>,      set::plane_rows<T>,    set::vector_rows<T>,
          set::add_plane<T>,     set::transpose<T>, set::write_planes<T>, set::write_vectors<T>, set::narrow<T>};
}
template SampleKernels<float> RENDSEG_SAMPLE_KERNELS<float>();
template SampleKernels<double> RENDSEG_SAMPLE_KERNELS<double>();
template SampleKernels<c10::Half> RENDSEG_SAMPLE_KERNELS<c10::Half>();
template SampleKernels<c10::BFloat16> RENDSEG_SAMPLE_KERNELS<c10::BFloat16>();

}  // namespace rendseg

#undef RENDSEG_SAMPLE_KERNELS
#undef RENDSEG_SAMPLE_NAMESPACE
