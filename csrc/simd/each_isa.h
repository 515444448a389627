// Includes the file VITKD_KERNELS, which is written for any Vec of Reals, once for each kind of
// register, in namespaces of VITKD_NAMESPACE: avx512, avx2, and float32 and float64 for one number
// at a time (unless VITKD_REGISTERS_ONLY is defined). VITKD_BEST chooses between what they hold.
#if defined(__x86_64__)
VITKD_TARGET_BEGIN(VITKD_AVX512)
namespace VITKD_NAMESPACE::avx512 {
namespace {
using Real = float;
using vitkd::avx512::Scale, vitkd::avx512::Vec;
#include VITKD_KERNELS
}  // namespace
}  // namespace VITKD_NAMESPACE::avx512
VITKD_TARGET_END

VITKD_TARGET_BEGIN(VITKD_AVX2)
namespace VITKD_NAMESPACE::avx2 {
namespace {
using Real = float;
using vitkd::avx2::Scale, vitkd::avx2::Vec;
#include VITKD_KERNELS
}  // namespace
}  // namespace VITKD_NAMESPACE::avx2
VITKD_TARGET_END

// of this name, by the selected instruction set; `otherwise` without such registers
#define VITKD_BEST(name, otherwise)                     \
  (contains(selected_isa(), Isa::avx512) ? avx512::name \
   : contains(selected_isa(), Isa::avx2) ? avx2::name   \
                                         : otherwise)
#else
#define VITKD_BEST(name, otherwise) (otherwise)
#endif

#if !defined(VITKD_REGISTERS_ONLY)
namespace VITKD_NAMESPACE::float32 {
namespace {
using Real = float;
using Vec = vitkd::One<float>;
using Scale = Vec::Scale;
#include VITKD_KERNELS
}  // namespace
}  // namespace VITKD_NAMESPACE::float32

namespace VITKD_NAMESPACE::float64 {
namespace {
using Real = double;
using Vec = vitkd::One<double>;
using Scale = Vec::Scale;
#include VITKD_KERNELS
}  // namespace
}  // namespace VITKD_NAMESPACE::float64
#endif
