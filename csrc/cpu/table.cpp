// table.cpp - the file that is compiled once per instruction set (setup.py passes -DISA=... and
// flags).
#include "peak.cpp"
#include "matmul.cpp"
#include "embedding.cpp"
#include "norm.cpp"
#include "rope.cpp"
#include "softmax.cpp"
#include "attention.cpp"
#include "activation.cpp"
#include "cross_entropy.cpp"
#include "adamw.cpp"
#include "muon.cpp"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

extern const Kernels JOIN(kernels_, ISA) = {
    STRING(ISA),
#if defined(__AVX512BF16__)
    true,
#else
    false,
#endif
    ISA::peak,
    ISA::read,
    ISA::copy,
    ISA::barriers,
    ISA::matmul,
    ISA::packed_size,
    ISA::pack,
    ISA::sum_rows,
    ISA::embedding_forward,
    ISA::embedding_backward,
    ISA::rms_norm_forward,
    ISA::rms_norm_backward,
    ISA::layer_norm_forward,
    ISA::layer_norm_backward,
    ISA::rope,
    ISA::softmax_forward,
    ISA::softmax_backward,
    ISA::attention_forward,
    ISA::attention_backward,
    ISA::add,
    ISA::swiglu_forward,
    ISA::swiglu_backward,
    ISA::gelu_forward,
    ISA::gelu_backward,
    ISA::cross_entropy_forward,
    ISA::cross_entropy_backward,
    ISA::linear_cross_entropy_forward,
    ISA::linear_cross_entropy_backward,
    ISA::linear_cross_entropy_with_gradients,
    ISA::adamw,
    ISA::muon,
    ISA::sum_squares,
};
